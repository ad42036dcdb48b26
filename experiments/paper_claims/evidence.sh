#!/bin/sh
# The figures of docs/results.md, step by step, from the root of the repository:
#
#     sh experiments/paper_claims/evidence.sh table4
#     sh experiments/paper_claims/evidence.sh grid         then pixel, ...
#
# table4     sets under `published`: random real images, whole and packed; Baseline, +RPM, +AP, +RPM+AP (ROME)
# grid       networks trained on them, under the white-box attacks of the paper (threat model published)
# pixel      the same sets under the valid threat model: PGD-20 and AutoAttack at 1, 2, 4, 8 of 255
# sweep      Figure 4: align_weight 0, 0.5, 0.8 and 1 (0.2 is +RPM+AP)
# cifar100   1 and 10 images a class: ROME and random real images, under published and, with soft labels, under pixel
# released   BACON, IDM and MTT, files in checkpoints/: pixel; Figure 3 under the bounded attacks on 10 000 images,
#            under all attacks on 1 000
#
# The same command continues a step that was killed, and skips what is done. One process of one thread each; two steps
# can run side by side. OUT: the folder of the results. ONLY="Baseline +AP": these sets alone.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python3}" out="${OUT:-result/evidence}" precision="${PRECISION:-bf16}"
iterations=300
step="${1:-help}"

# wanted NAME: succeeds if ONLY is not set or contains NAME
wanted() {
    case " ${ONLY:-$1} " in *" $1 "*) ;; *) return 1 ;; esac
}

# distil SCRIPT FOLDER NAME FLAGS...: a file of several sets, $out/sets/FOLDER/ROME_res_*.pt
distil() {
    script="$1" folder="$2" name="$3"; shift 3
    wanted "$folder" || return 0
    $python -u "$script" --model ConvNetW32 --method "$name" --lr_img 0.2 --embed_last 1000 --net_decay --syn_ce --ce_weight 0.5 \
        --train_net_num 1 --model_train_steps 2 --trained_bs 64 --select last --no_baseline --num_eval 1 --test_limit 1000 \
        --precision "$precision" --save_path "$out/sets/$folder" --checkpoint_path "$out/states/$folder" "$@"
}

# cifar10 FOLDER NAME FLAGS...: ipc 10; an evaluation shows each image or sub-image 300 times
cifar10() {
    folder="$1" name="$2"; shift 2
    distil ROME_cifar10.py "$folder" "$name" --dataset CIFAR10 --ipc 10 --batch_real 32 --epoch_eval_train 300 --num_exp 5 "$@"
}
# cifar100 FOLDER NAME FLAGS...: $ipc images a class, 300 evaluation epochs, or 60 where there are ten times as many images
cifar100() {
    folder="$1" name="$2"; shift 2
    distil ROME_cifar100.py "$folder" "$name" --dataset CIFAR100 --ipc "$ipc" --batch_real 16 --num_exp 2 \
        --epoch_eval_train "$([ "$ipc" = 1 ] && echo 300 || echo 60)" "$@"
}
labels="--threat_model pixel --labels stored --robust_prior $out/teachers/full_ConvNetW32_CIFAR100_500_PGD-pixel_seed0-0.pth
    --lr_net 0.1 --lr_schedule cosine --label_temperature 3 --dsa_strategy crop_flip_scale_rotate"
rome="--aug --Iteration $iterations --eval_interval $iterations"

# evaluated FOLDER INTO FLAGS...: a network on each set
evaluated() {
    wanted "$1" || return 0
    folder="$1" into="$2"; shift 2
    $python -u evaluate.py --synset "$out/sets/$folder"/ROME_res_*.pt --num_eval 1 --precision "$precision" \
        --attack_precision "$precision" --limit 1000 --no_sanity --resume --out "$out/$into/$folder" "$@"
}

case "$step" in
table4)
    cifar10 Random-unpacked Random-unpacked --Iteration 0
    cifar10 Random Random --aug --Iteration 0
    cifar10 +RPM+AP +RPM+AP $rome
    cifar10 +AP +AP $rome --no_attack_pool
    cifar10 +RPM +RPM $rome --no_attack_prior
    cifar10 Baseline Baseline $rome --no_attack_pool --no_attack_prior ;;
grid)
    for set in Random-unpacked Random Baseline +RPM +AP +RPM+AP; do
        evaluated "$set" grid --threat_model published --attacks FGSM PGD PGD_L2 CW Deepfool AA --aa_iterations 10
    done ;;
pixel)
    for set in Random-unpacked Random Baseline +RPM +AP +RPM+AP; do
        evaluated "$set" pixel --threat_model pixel --untargeted --attacks PGD20 AA --eps 1 2 4 8 --limit 500 --queries 1000
    done ;;
sweep)
    for weight in 0 0.5 0.8 1; do
        cifar10 "align-weight-$weight" "align-weight-$weight" $rome --align_weight "$weight" --num_exp 2
    done ;;
cifar100)
    $python -u pretrain.py --dataset CIFAR100 --model ConvNetW32 --threat_model pixel --epochs 14 --attack_steps 3 --batch_train 128 \
        --lr_net 0.1 --precision "$precision" --checkpoint_path "$out/teachers"
    for ipc in 1 10; do
        cifar100 "CIFAR100-Random-unpacked-$ipc" Random-unpacked --Iteration 0
        cifar100 "CIFAR100-Random-$ipc" Random --Iteration 0 --aug
        cifar100 "CIFAR100-ROME-$ipc" ROME --aug --Iteration 50 --eval_interval 50
        cifar100 "CIFAR100-Random-$ipc-labels" Random-labels --Iteration 0 --aug $labels
        cifar100 "CIFAR100-ROME-$ipc-labels" ROME-labels --aug --Iteration 50 --eval_interval 50 $labels
    done ;;
released)
    networks="checkpoints/BACON*.pth checkpoints/IDM*.pth checkpoints/MTT*.pth"
    for part in "pixel --threat_model pixel --untargeted --attacks PGD20 AA --eps 1 2 4 8 --limit 500 --queries 1000" \
        "figure3 --threat_model published --transfer --attacks FGSM PGD PGD_L2" \
        "figure3_all --threat_model published --transfer --attacks FGSM PGD PGD_L2 CW Deepfool AA --aa_iterations 10 --limit 1000"; do
        $python -u evaluate.py --networks $networks --attack_precision "$precision" --no_sanity --resume --out "$out/released_"$part
    done ;;
*)
    sed -n '2,/^set/{/^#/p;}' "$0" ;;
esac
