"""Quicker lowering: programs share an MLIR context, which takes longer to make than most of them.

JAX makes one for each program. It is a seventh of the time of the fast tests, most of whose
programs are small. One for all is slower again, since it keeps what every program had.
"""

import threading

try:
  from jax._src.interpreters import mlir
except ImportError:
  # It is no public name of JAX.
  mlir = None

PROGRAMS = 64  # that share a context


def share_contexts():
  """Lets programs that a thread lowers one after the other share a context.

  Without JAX's own function for it, programs are lowered as usual.
  """
  make = getattr(mlir, "make_ir_context", None)
  if make is None:
    return
  own = threading.local()

  def context():
    if getattr(own, "left", 0) == 0:
      own.context, own.left = make(), PROGRAMS
    own.left -= 1
    return own.context

  mlir.make_ir_context = context
