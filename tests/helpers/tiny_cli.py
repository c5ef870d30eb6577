"""The command `gating-jax` with very small networks, `--config.model.name=tiny` and the like."""

import functools
import operator

from gating_jax import cli
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnets, video_backbones
from gating_jax.models.resnets import NamedResNet, ResNet

TINY = NamedResNet("cifar", BasicBlock, (1,), 8, "A")
TINY_LIGHT, TINY_HEAVY = (
  functools.partial(ResNet, classes=None, blocks=(1,), features=4, stem=stem)
  for stem in ("cifar", "small")
)


def register(setitem=operator.setitem):
  """Makes the tiny networks known under the name `tiny`; `setitem` may be that of a MonkeyPatch."""
  setitem(resnets.RESNETS, "tiny", TINY)
  setitem(video_backbones.LIGHT_NETS, "tiny", TINY_LIGHT)
  setitem(video_backbones.HEAVY_NETS, "tiny", TINY_HEAVY)


if __name__ == "__main__":
  register()
  cli.main()
