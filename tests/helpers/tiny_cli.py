"""The command `gating-jax` with very small networks, `--config.model.name=tiny` and the like."""

from gating_jax import cli
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnets, video_backbones
from gating_jax.models.resnets import NamedResNet, ResNet

TINY = NamedResNet("cifar", BasicBlock, (1,), 8, "A")
TINY_LIGHT, TINY_HEAVY = (
  (ResNet, dict(classes=None, blocks=(1,), features=4, stem=stem)) for stem in ("cifar", "small")
)

if __name__ == "__main__":
  resnets.RESNETS["tiny"] = TINY
  video_backbones.LIGHT_NETS["tiny"], video_backbones.HEAVY_NETS["tiny"] = TINY_LIGHT, TINY_HEAVY
  cli.main()
