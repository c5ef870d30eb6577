"""The command `gating-jax`, with one more, very small network to name: `--config.model.name=tiny`."""

from gating_jax import cli
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnet

TINY = ("cifar", BasicBlock, (1,), 8, "A")

if __name__ == "__main__":
  resnet.RESNETS["tiny"] = TINY
  cli.main()
