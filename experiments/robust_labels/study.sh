#!/bin/sh
# The study of docs/stored_labels.md, step by step, from the root of the repository:
#
#     sh experiments/robust_labels/study.sh teachers
#     sh experiments/robust_labels/study.sh sets 10        then judge 10, ...
#
# teachers     three ConvNetW32 and a ConvNet, adversarially trained
# sets IPC     sets of IPC images a class with soft labels, three of each kind: random real images (whole, 2x2, 4x4),
#              Baseline, ROME; each run ends with clean accuracy and PGD-20, with soft labels and with the classes alone
# judge IPC    AutoAttack on networks trained on these sets, with soft labels and with the classes alone. Run `teaching`
#              and `chosen` before `judge 10`
# teaching     other teachers and temperatures (10 images a class, random images packed 4x4)
# chosen       images on which teachers and students disagree; the pool as the teacher (10 images a class, 4x4). The
#              students are the networks of ONLY=Random-4x4 judge 10
# convnet      the best sets and their controls, learned by a ConvNet
# all          these ConvNets on all test images: clean, and FGSM at 2/255
# cross        other architectures on the best set
#
# The same command continues a step that was killed, and skips what is done. One process of one thread each; two steps
# can run side by side. OUT: the folder of the results. ONLY="Random ROME-4x4": these sets alone. All of it takes about
# 12 hours on two cores with bf16 instructions.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python3}" out="${OUT:-result/robust_labels}" precision="${PRECISION:-bf16}"
teacher="$out/teachers/full_ConvNetW32_CIFAR10_5000_PGD-pixel_seed0" large="$out/teachers/full_ConvNet_CIFAR10_5000_PGD-pixel_seed0"
recipe="--lr_net 0.1 --lr_schedule cosine --label_temperature 3"
step="${1:-help}" ipc="${2:-10}"

pretrain() {
    $python -u pretrain.py --dataset CIFAR10 --threat_model pixel --epochs 14 --attack_steps 3 --batch_train 128 --lr_net 0.1 \
        --precision "$precision" --checkpoint_path "$out/teachers" "$@"
}

# wanted NAME: succeeds if ONLY is not set or contains NAME
wanted() {
    case " ${ONLY:-$1} " in *" $1 "*) ;; *) return 1 ;; esac
}

# distil NAME EPOCHS TEACHERS FLAGS...: a file of three sets, $out/sets/NAME/ROME_res_*.pt
distil() {
    name="$1" epochs="$2" networks="$3"; shift 3
    wanted "$name" || return 0
    $python -u ROME_cifar10.py --dataset CIFAR10 --model ConvNetW32 --method "$name" --threat_model pixel --robust_prior $networks \
        --labels stored $recipe --epoch_eval_train "$epochs" --dsa_strategy crop_flip_scale_rotate --lr_img 0.2 --embed_last 1000 \
        --syn_ce --ce_weight 0.5 --train_net_num 1 --batch_real 32 --select last --no_baseline --num_exp 3 --num_eval 1 \
        --test_limit 1000 --precision "$precision" --save_path "$out/sets/$name-$ipc" --checkpoint_path "$out/states/$name-$ipc" \
        "$@"
}

# judge OUT FILES... FLAGS...: a network on each set
judge() {
    folder="$out/judged/$1"; shift
    $python -u evaluate.py --num_eval 1 --labels own --precision "$precision" --attack_precision "$precision" \
        --threat_model pixel --untargeted --limit 1000 --attacks PGD20 AA --eps 2 4 --aa_limit 500 --queries 1000 \
        --no_sanity --out "$folder" --resume --synset "$@"
}

three="$teacher-0.pth $teacher-1.pth $teacher-2.pth"
case "$ipc" in  # epochs: a network sees 160 000 to 320 000 images, but at most 2 000 times each
    1) whole=2000 packed=1000 finer=500 iterations=100 ;;
    10) whole=1000 packed=400 finer=200 iterations=100 ;;
    *) whole=400 packed=100 finer=40 iterations=50 ;;
esac

case "$step" in
teachers)
    pretrain --model ConvNetW32 --num_nets 3
    pretrain --model ConvNet --test_limit 1000 ;;
sets)
    distil Random-unpacked "$whole" "$three" --ipc "$ipc" --Iteration 0
    distil Random "$packed" "$three" --ipc "$ipc" --Iteration 0 --aug
    distil Random-4x4 "$finer" "$three" --ipc "$ipc" --Iteration 0 --pack 4
    distil ROME-unpacked "$whole" "$three" --ipc "$ipc" --Iteration "$iterations" --eval_interval "$iterations"
    distil ROME "$packed" "$three" --ipc "$ipc" --Iteration "$iterations" --eval_interval "$iterations" --aug
    distil ROME-4x4 "$finer" "$three" --ipc "$ipc" --Iteration "$iterations" --eval_interval "$iterations" --pack 4
    # The Baseline matches clean images on a pool of clean networks. The robust networks label its images afterwards.
    wanted Baseline &&
    $python -u ROME_cifar10.py --dataset CIFAR10 --model ConvNetW32 --method Baseline-classes --threat_model pixel --no_attack_pool \
        --no_attack_prior --ipc "$ipc" --aug --lr_img 0.2 --embed_last 1000 --net_decay --syn_ce --ce_weight 0.5 --train_net_num 1 \
        --batch_real 32 --trained_bs 64 --Iteration "$iterations" --eval_interval "$iterations" --select last --no_baseline \
        --num_exp 3 --num_eval 1 --epoch_eval_train 50 --test_limit 50 --precision "$precision" \
        --save_path "$out/sets/Baseline-hard-$ipc" --checkpoint_path "$out/states/Baseline-hard-$ipc"
    distil Baseline "$packed" "$three" --ipc "$ipc" --Iteration 0 --aug \
        --init "$out/sets/Baseline-hard-$ipc/ROME_res_Baseline-classes_CIFAR10_ConvNetW32_${ipc}ipc.pt" ;;
judge)
    names="Random-unpacked Random Random-4x4 Baseline ROME-unpacked ROME ROME-4x4"
    [ "$ipc" != 10 ] || names="$names Disagree Pool-4x4 One-teacher Temperature-1 Temperature-10"
    for name in $names; do
        case $name in  # the images of Random-4x4 with other labels
            One-teacher | Temperature-*) labels=own ;;
            *) labels="own hard" ;;
        esac
        ! wanted "$name" || judge "$name-$ipc" "$out/sets/$name-$ipc"/ROME_res_*.pt --labels $labels
    done ;;
teaching)
    distil One-teacher 200 "$teacher-0.pth" --ipc 10 --Iteration 0 --pack 4
    for t in 1 10; do
        distil "Temperature-$t" 200 "$three" --ipc 10 --Iteration 0 --pack 4 --label_temperature "$t"
    done
    # A larger teacher. The run evaluates networks of its kind for one epoch; `judge` trains ConvNetW32.
    distil Large-teacher 200 "$large-0.pth" --ipc 10 --Iteration 0 --pack 4 --model ConvNet --epoch_eval_train 1
    judge Large-teacher-10 "$out"/sets/Large-teacher-10/ROME_res_*.pt --model ConvNetW32 --attacks PGD20 --eps 2 4 8 \
        --epoch_eval_train 200 ;;
chosen)
    PYTHONPATH=. $python experiments/robust_labels/disagree.py "$out/disagree.pt" $three \
        --students "$out"/judged/Random-4x4-10/networks/*-0.pth
    distil Disagree "$finer" "$three" --ipc 10 --Iteration 0 --pack 4 --init "$out/disagree.pt"
    # The pool instead of pretrained networks: its networks are matched while they train, and give the labels.
    $python -u ROME_cifar10.py --dataset CIFAR10 --model ConvNetW32 --method Pool-4x4 --threat_model pixel --labels stored $recipe \
        --epoch_eval_train "$finer" --dsa_strategy crop_flip_scale_rotate --lr_img 0.2 --embed_last 1000 --net_decay --syn_ce \
        --ce_weight 0.5 --train_net_num 1 --batch_real 32 --trained_bs 64 --Iteration 100 --eval_interval 100 --select last \
        --no_baseline --num_exp 3 --num_eval 1 --test_limit 1000 --precision "$precision" --ipc 10 --pack 4 \
        --save_path "$out/sets/Pool-4x4-10" --checkpoint_path "$out/states/Pool-4x4-10" ;;
convnet)
    for name in Random-4x4 Random ROME-4x4 Disagree; do
        labels="own hard"
        [ "$name" != Disagree ] || labels=own
        ! wanted "$name" || judge "$name-10-ConvNet" "$out/sets/$name-10"/ROME_res_*.pt --model ConvNet --lr_net 0.05 \
            --labels $labels
    done ;;
all)
    for name in ROME-4x4 Disagree; do
        ! wanted "$name" || $python -u evaluate.py --threat_model pixel --untargeted --attacks FGSM --eps 2 --no_sanity --resume \
            --out "${out}_all/$name" --networks "$out/judged/$name-10-ConvNet/networks/$name-pixel_ConvNet_"*.pth
    done ;;
cross)
    for model in MLP LeNet AlexNet VGG11 ResNet18; do  # the last three see fewer images, and no AutoAttack: they take long
        case $model in
            MLP | LeNet) epochs=200 attacks="PGD20 AA" ;;
            ResNet18) epochs=30 attacks=PGD20 ;;
            *) epochs=50 attacks=PGD20 ;;
        esac
        ! wanted "$model" || judge "ROME-4x4-10-$model" "$out"/sets/ROME-4x4-10/ROME_res_*.pt --model "$model" --lr_net 0.02 \
            --epoch_eval_train "$epochs" --attacks $attacks --eps 2 4
    done ;;
*)
    sed -n '2,/^set/{/^#/p;}' "$0" ;;
esac
