"""Fine-tunes a BERT classifier whose training state is several times larger than the memory of all GPUs together.

Usage:
    python examples/finetune.py                            # the machine's GPUs, or two small emulated ones
    python examples/finetune.py --gpus 4 strategy.mode=dp
    python examples/finetune.py strategy=plain             # Lightning's own default, for comparison
"""

import hydra
import lightning as L
from hydra.utils import instantiate
from launch import accept_flags, gpu_nbytes, make_trainer
from omegaconf import DictConfig
from report import Meter, print_report


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
def main(cfg: DictConfig) -> None:
    L.seed_everything(cfg.seed)
    model, data, meter = instantiate(cfg.model), instantiate(cfg.data), Meter("val_accuracy")
    trainer = make_trainer(cfg, meter)
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    print_report(trainer, meter, gpu_nbytes(cfg, trainer))


if __name__ == "__main__":
    accept_flags("gpus", "gpu_memory")
    main()
