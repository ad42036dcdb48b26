#!/bin/sh
# The study of labels at every input (docs/robust_labels.md), from the root of the repository:
#
#     sh experiments/online_labels/study.sh teachers        then sets, protocol, images, controls, ...
#
# A cell is three sets, one network each, that learn for 3 000 steps of 100 images unless its name says more; then
# PGD-20 on all test images. Cells that have a result are left out, so the same command continues. One thread:
# 8 minutes a cell with ConvNetW32.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH=.
python="${PYTHON:-python3}" out="${OUT:-result/online_labels}"
data_path="${DATA:-./data}"
w32=experiments/robust_labels/teachers/full_ConvNetW32_CIFAR10_5000_PGD-pixel_seed0
teacher=$w32-0.pth sets="$out/sets" teachers="$out/teachers"
w64=$teachers/full_ConvNetW64_CIFAR10_5000_PGD-pixel_seed0-0.pth
w128=$teachers/full_ConvNet_CIFAR10_5000_PGD-pixel_seed0-0.pth

pretrain() {
    $python -u pretrain.py --threat_model pixel --epochs 14 --batch_train 128 --lr_net 0.1 --precision bf16 \
        --data_path "$data_path" --checkpoint_path "$teachers" "$@"
}

make_sets() {
    name=$1; shift
    [ -e "$sets/$name.pt" ] || $python experiments/online_labels/sets.py "$sets/$name.pt" --data_path "$data_path" "$@"
}

# cell NAME SET FLAG...: networks trained on the sets of a file
cell() {
    name=$1 set=$2; shift 2
    [ -e "$out/$name/done" ] && return
    $python evaluate.py --data_path "$data_path" --synset "$sets/$set.pt" --method "$name" --model ConvNetW32 \
        --labels own --num_eval 1 --lr_net 0.2 --lr_schedule cosine --warm_up 0.1 \
        --dsa_strategy crop_flip_scale_rotate --label_temperature 3 --batch_train 100 --epoch_eval_train 2999 \
        --precision bf16 --attack_precision bf16 --threat_model pixel --untargeted --attacks PGD20 --eps 2 4 8 \
        --no_sanity --out "$out/$name" --resume "$@"
    touch "$out/$name/done"
}

# taught NAME SET TEACHER FLAG...: the same with labels of a network at every input
taught() { name=$1 set=$2 by=$3; shift 3; cell "$name" "$set" --mix cutmix_mixup --labeller "$by" "$@"; }

# online NAME SET FLAG...: of the first ConvNetW32
online() { name=$1 set=$2; shift 2; taught "$name" "$set" $teacher "$@"; }

# attack NAME FILE... FLAG...: networks that are there already
attack() {
    name=$1; shift
    [ -e "$out/$name/done" ] && return
    $python evaluate.py --data_path "$data_path" --attack_precision bf16 --threat_model pixel --untargeted --eps 2 4 8 \
        --queries 1000 --out "$out/$name" --resume --networks "$@"
    touch "$out/$name/done"
}

# autoattack NAME FILE...: on 1 000 images
autoattack() { attack "$@" --attacks AA --limit 1000 --no_sanity; }

case $1 in
teachers)
    pretrain --model ConvNet --attack_steps 3
    pretrain --model ConvNetW64 --attack_steps 3
    pretrain --model ConvNetW32 --attack_steps 0 ;;
sets)
    mkdir -p "$sets"
    make_sets whole
    make_sets whole1 --sets 1
    make_sets packed2 --pack 2
    make_sets packed4 --pack 4
    make_sets noise --images noise
    make_sets ten --images repeated --distinct 10
    make_sets one --images repeated --distinct 1
    make_sets ipc12 --ipc 12
    make_sets ipc50 --ipc 50
    for name in ROME ROME-4x4 Baseline; do cp experiments/robust_labels/ready/$name/*.pt "$sets/$name.pt"; done
    for views in 1 4 16; do make_sets views$views --views $views --teachers $teacher; done ;;
protocol)
    online whole whole
    online mix-none whole --mix none
    online mixup whole --mix mixup
    online cutmix whole --mix cutmix
    online one-of-both whole --mix both
    online no-warm-up whole --warm_up 0
    online lr-0.1 whole --lr_net 0.1
    online noise-0.3 whole --noise 0.3
    online temperature-1 whole --label_temperature 1
    online three-teachers whole --labeller $w32-*.pth
    taught teacher-W64 whole "$w64"
    taught teacher-ConvNet whole "$w128" ;;
steps)
    online steps-300 whole --epoch_eval_train 299
    online steps-1000 whole --epoch_eval_train 999
    online steps-10000 whole --epoch_eval_train 9999
    online two-labellers-10000 whole --labeller $teacher "$w64" --epoch_eval_train 9999
    online steps-10000-ema whole --epoch_eval_train 9999 --ema 0.999 ;;
images)  # the same number of steps: 3 000
    online packed2 packed2 --epoch_eval_train 749
    online packed4 packed4 --epoch_eval_train 187
    online ROME ROME --epoch_eval_train 749 --num_eval 3
    online ROME-4x4 ROME-4x4 --epoch_eval_train 187 --num_eval 3
    online Baseline Baseline --epoch_eval_train 749 --num_eval 3
    online whole whole
    [ -e "$sets/disagree.pt" ] || $python experiments/robust_labels/disagree.py "$sets/disagree.pt" $teacher --pack 1 \
        --students "$out"/whole/networks/*.pth --data_path "$data_path"
    online disagree disagree
    online ipc50 ipc50 --epoch_eval_train 599
    online ten-images ten
    online one-image one
    online noise-images noise ;;
controls)
    taught natural-teacher whole "$teachers/full_ConvNetW32_CIFAR10_5000_None_seed0-0.pth"
    cell equal-bytes-hard ipc12 --epoch_eval_train 1499
    cell views-1 views1 --dsa_strategy none
    cell views-4 views4 --dsa_strategy none --epoch_eval_train 749
    cell views-16 views16 --dsa_strategy none --epoch_eval_train 187 ;;
convnet)
    taught ConvNet whole "$w64" --model ConvNet --epoch_eval_train 9999 ;;
students)  # a learning rate for each kind, not tuned further
    online whole-LeNet whole --model LeNet --lr_net 0.05
    online whole-MLP whole --model MLP --lr_net 0.05
    for model in AlexNet VGG11 ResNet18; do  # one set, 1 000 steps, 1 000 test images
        online whole-$model whole1 --model $model --lr_net 0.05 --epoch_eval_train 999 --limit 1000
    done ;;
cifar100)
    pretrain --dataset CIFAR100 --model ConvNetW32 --attack_steps 3
    make_sets cifar100 --dataset CIFAR100
    taught CIFAR100 cifar100 "$teachers/full_ConvNetW32_CIFAR100_500_PGD-pixel_seed0-0.pth" --epoch_eval_train 299 ;;
judge)  # NAME...: AutoAttack on the networks of these cells
    shift
    for cell in "$@"; do autoattack "$cell-AA" "$out/$cell"/networks/*.pth; done ;;
checks)  # signs of masked gradients, and attacks of each network on the other
    attack checks "$out"/two-labellers-10000/networks/*_0-0.pth "$out"/ConvNet/networks/*_0-0.pth --attacks PGD20 Square \
        --eps 2 8 --transfer --limit 500 ;;
judge-teachers)
    attack teachers-PGD20 $teacher "$w64" "$w128" --method teacher-W32 teacher-W64 teacher-ConvNet --attacks PGD20 \
        --no_sanity
    autoattack teacher-W32-AA $teacher --method teacher-W32
    autoattack teacher-W64-AA "$w64" --method teacher-W64 ;;
esac
