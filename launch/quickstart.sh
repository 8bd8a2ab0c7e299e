#!/usr/bin/env bash
# Train a tiny Llama-3.2-Vision model on two ranks, in .venv, which is made first where there is none.
#     bash launch/quickstart.sh
#     bash launch/quickstart.sh --steps 100 --output_dir runs/short     (arguments of quickstart.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

# Two ranks need two GPUs of one machine, or none.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -lt 2 ]; then
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

# DeepSpeed calls functions that the newest PyTorch has other names for.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}"

exec deepspeed --quiet --num_gpus 2 launch/quickstart.py \
  --deepspeed_config ds_configs/quickstart.json "$@"
