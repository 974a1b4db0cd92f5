"""A student under every loss: equal steps, plain training and a control beside them.

Examples:
  python -m experiments.distillation.losses
  python -m experiments.distillation.losses --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.distillation.losses --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.distillation.losses --config.data=cifar10 --data_dir=<folder with CIFAR-10 and the ResNets>
  python -m experiments.distillation.losses --config.data=cifar10 --config.student=resnet20 --data_dir=...

The student is its teacher with most units of each layer cut out, and starts from what is left; a ResNet-56 also
teaches a ResNet-20 that was trained elsewhere. It is trained by ``cross entropy + w * loss``. No weight ``w`` is
tuned: each is such that at the start the gradient of its term is as long as that of the cross entropy. ``permuted
targets`` is the control: the teacher's confidence, and nothing of what it knows.

Expect from the literature: on MNIST, soft targets halved the gap between a small net and its teacher, 146 errors to 74
with the teacher's 67 (Hinton et al. 2015, arXiv:1503.02531), where the teacher saw augmented images. Tian et al. (2020,
arXiv:1910.10699) found that most losses on features alone do no better than soft targets.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import runner
from experiments.distillation.residual import Residual
from experiments.distillation.schools import Config, Schools, config_of


def of(config: Config, data_dir: str | None, workdir: str | None) -> Schools:
    """The experiment of a config."""
    return (Residual if config.data == "cifar10" else Schools)(config, data_dir, workdir)


def main(argv: Sequence[str] | None = None) -> int:
    return runner.of_config(__doc__, "runs/distillation/<name of the config>", config_of, of, argv)


if __name__ == "__main__":
    sys.exit(main())
