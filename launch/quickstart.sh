#!/usr/bin/env bash
# Train a tiny Llama-3.2-Vision model on two ranks, in .venv, which is made first where there is none.
#     bash launch/quickstart.sh
#     bash launch/quickstart.sh --steps 100 --output_dir runs/short     (arguments of quickstart.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

# Two ranks need two GPUs, or none at all. A free port lets another job run beside this one.
read -r gpus port < <(python -c '
import socket, torch
with socket.create_server(("127.0.0.1", 0)) as server:
    print(torch.cuda.device_count(), server.getsockname()[1])')
if [ "$gpus" -lt 2 ]; then
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
# DeepSpeed calls functions for which the newest PyTorch has other names.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}"

exec deepspeed --quiet --num_gpus 2 --master_port "$port" launch/quickstart.py \
  --deepspeed_config ds_configs/quickstart.json "$@"
