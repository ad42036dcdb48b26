#!/bin/sh
# Labels at every input (docs/online_labels.md), from the root of the repository; one thread, half an hour:
#
#     sh experiments/online_labels/study.sh
#
# Two sets of random real images, whole and packed 2x2, with the ConvNetW32 of experiments/robust_labels as labeller;
# networks trained on them for 3 000 and 10 000 steps; PGD-20 on all test images, AutoAttack on 500.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python3}" out="${OUT:-result/online_labels}"
teacher=experiments/robust_labels/teachers/full_ConvNetW32_CIFAR10_5000_PGD-pixel_seed0-0.pth
judge="--threat_model pixel --untargeted --eps 2 4 8 --no_sanity"

make_set() {
    name=$1; shift
    $python ROME_cifar10.py --method "$name" --model ConvNetW32 --ipc 10 --threat_model pixel --labels online --mix both \
        --robust_prior $teacher --lr_net 0.1 --lr_schedule cosine --dsa_strategy crop_flip_scale_rotate --Iteration 0 \
        --epoch_eval_train 1 --num_exp 1 --num_eval 1 --select last --no_baseline --test_limit 100 --precision bf16 \
        --save_path "$out/sets" --checkpoint_path "$out/checkpoints" "$@"
}

train() {
    name=$1 method=$2 epochs=$3; shift 3
    $python evaluate.py --synset "$out/sets/ROME_res_${method}_CIFAR10_ConvNetW32_10ipc.pt" --epoch_eval_train "$epochs" \
        --attacks PGD20 --labels own --precision bf16 --num_eval 1 $judge --out "$out/$name" "$@"
}

make_set Random1
make_set Random2 --pack 2
train whole_3000 Random1 3000
train packed_3000 Random2 1500
train whole_10000 Random1 10000
train whole_10000_ema Random1 10000 --ema 0.999
$python evaluate.py --networks "$out"/whole_10000/networks/*.pth --model ConvNetW32 --attacks AA --aa_limit 500 --limit 500 \
    --queries 1000 --attack_precision bf16 $judge --out "$out/aa_whole_10000"
