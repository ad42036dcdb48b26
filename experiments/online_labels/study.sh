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
robust=5000_PGD-pixel_seed0-0.pth

pretrain() {
    $python -u pretrain.py --threat_model pixel --epochs 14 --batch_train 128 --lr_net 0.1 --precision bf16 \
        --data_path "$data_path" --checkpoint_path "$teachers" "$@"
}

make_sets() {
    name=$1; shift
    [ -e "$sets/$name.pt" ] || $python experiments/online_labels/sets.py "$sets/$name.pt" --data_path "$data_path" "$@"
}

# cell NAME SET FLAG...: networks trained on the sets of a file, or those of --networks
cell() {
    name=$1 set=$2; shift 2
    [ -e "$out/$name/done" ] && return
    $python evaluate.py --data_path "$data_path" --synset "$set" --method "$name" --labels own --num_eval 1 \
        --lr_net 0.1 --lr_schedule cosine --dsa_strategy crop_flip_scale_rotate --label_temperature 3 --batch_train 100 \
        --epoch_eval_train 3000 --precision bf16 --attack_precision bf16 \
        --threat_model pixel --untargeted --attacks PGD20 --eps 2 4 8 --no_sanity --out "$out/$name" "$@"
    touch "$out/$name/done"
}

# online NAME SET FLAG...: the same with labels of the first ConvNetW32
online() { name=$1 set=$2; shift 2; cell "$name" "$sets/$set.pt" --labeller $teacher --mix both "$@"; }

case $1 in
teachers)
    pretrain --model ConvNet --attack_steps 3
    pretrain --model ConvNetW64 --attack_steps 3
    pretrain --model ConvNetW32 --attack_steps 0 ;;
sets)
    mkdir -p "$sets"
    make_sets whole
    make_sets packed2 --pack 2
    make_sets packed4 --pack 4
    make_sets noise --images noise
    make_sets ten --images repeated --distinct 10
    make_sets one --images repeated --distinct 1
    make_sets ipc12 --ipc 12
    make_sets ipc50 --ipc 50
    for views in 1 4 16; do make_sets views$views --views $views --teachers $teacher; done ;;
protocol)
    online whole whole
    online mix-none whole --mix none
    online mixup whole --mix mixup
    online cutmix whole --mix cutmix
    online noise-0.3 whole --noise 0.3
    online temperature-1 whole --label_temperature 1
    online three-teachers whole --labeller $w32-*.pth
    online teacher-W64 whole --labeller "$teachers"/full_ConvNetW64_CIFAR10_$robust
    online teacher-ConvNet whole --labeller "$teachers"/full_ConvNet_CIFAR10_$robust ;;
images)  # the same number of steps: 3 000
    online packed2 packed2 --epoch_eval_train 749
    online packed4 packed4 --epoch_eval_train 187
    online ipc50 ipc50 --epoch_eval_train 599
    online ten-images ten
    online one-image one
    online noise-images noise ;;
controls)
    online natural-teacher whole --labeller "$teachers"/full_ConvNetW32_CIFAR10_5000_None_seed0-0.pth
    cell equal-bytes-hard "$sets/ipc12.pt" --epoch_eval_train 1499
    cell views-1 "$sets/views1.pt" --dsa_strategy none
    cell views-4 "$sets/views4.pt" --dsa_strategy none --epoch_eval_train 749
    cell views-16 "$sets/views16.pt" --dsa_strategy none --epoch_eval_train 187 ;;
steps)
    online steps-300 whole --epoch_eval_train 299
    online steps-1000 whole --epoch_eval_train 999
    online steps-10000 whole --epoch_eval_train 9999 ;;
convnet)
    best="$teachers"/full_${BEST:-ConvNet}_CIFAR10_$robust
    online ConvNet-10000 whole --model ConvNet --lr_net 0.05 --epoch_eval_train 9999 --labeller "$best" ;;
students)  # a learning rate for each kind, not tuned further
    online whole-LeNet whole --model LeNet --lr_net 0.02
    online whole-MLP whole --model MLP --lr_net 0.02
    online whole-AlexNet whole --model AlexNet --lr_net 0.02
    online whole-VGG11 whole --model VGG11 --lr_net 0.02
    online whole-ResNet18 whole --model ResNet18 --lr_net 0.02 --epoch_eval_train 999 ;;
cifar100)
    pretrain --dataset CIFAR100 --model ConvNetW32 --attack_steps 3
    make_sets cifar100 --dataset CIFAR100
    cell CIFAR100-whole "$sets/cifar100.pt" --mix both --epoch_eval_train 299 \
        --labeller "$teachers"/full_ConvNetW32_CIFAR100_500_PGD-pixel_seed0-0.pth
    cell CIFAR100-hard "$sets/cifar100.pt" --epoch_eval_train 299 ;;
judge)  # AutoAttack on the networks of the cells named
    shift
    for name in "$@"; do
        [ -e "$out/$name-AA/done" ] && continue
        $python evaluate.py --data_path "$data_path" --networks "$out/$name"/networks/*.pth --attacks AA --limit 500 \
            --queries 1000 --attack_precision bf16 --threat_model pixel --untargeted --eps 2 4 8 --no_sanity \
            --out "$out/$name-AA"
        touch "$out/$name-AA/done"
    done ;;
esac
