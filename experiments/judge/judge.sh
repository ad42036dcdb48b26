#!/bin/sh
# The judge before networks of known robustness (README.md), from the root of the repository. An hour of one thread.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH=.
python="${PYTHON:-python3}" out="${OUT:-result/judge}" data_path="${DATA:-./data}"
for eps in 0 2 4; do
    steps=3; [ $eps = 0 ] && steps=0
    $python -u pretrain.py --threat_model pixel --model ConvNetW32 --epochs 14 --batch_train 128 --lr_net 0.1 --precision bf16 \
        --data_path "$data_path" --checkpoint_path "$out/networks" --attack_steps $steps --attack_eps $((eps ? eps : 8)) --aa_limit 0
done
name=$out/networks/full_ConvNetW32_CIFAR10_5000
$python experiments/judge/judge.py ${name}_None_seed0-0.pth ${name}_PGD2-pixel_seed0-0.pth ${name}_PGD4-pixel_seed0-0.pth \
    experiments/robust_labels/teachers/full_ConvNetW32_CIFAR10_5000_PGD-pixel_seed0-0.pth --data_path "$data_path" --out "$out/judged"
