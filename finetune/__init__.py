"""Fine-tuning runs: supervised fine-tuning (and pretraining) with the masked diffusion objective."""
