# make demo            install into .venv and distil the embedded digits (about 4 minutes on two CPU cores)
# make demo-table      the demo for five seeds on each kind of processor (two hours), and the table over the seeds;
#                      LABELS=hard: without the labels of the robust networks (an hour)
# make test            install into .venv and run the tests
# make test-slow       the tests marked slow: ten kills of a real run, a full pool saved
# make test-gpu        what only a GPU can show, in ten minutes, with python3 as it is: no installation, no network
# make benchmark-gpu   seconds at the published sizes on a GPU, likewise
# make verify-row      recompute a folder of results on a sample: ROW=experiments/... FILES="networks that are not in it"
# make test-machines   the tests on each kind of processor, with two threads, with the lowest and the newest torch (an hour)
PYTHON ?= python3
VENV ?= .venv
LABELS ?= stored
BIN = $(VENV)/bin

.PHONY: demo demo-table test test-slow test-gpu benchmark-gpu verify-row test-machines clean

demo: $(VENV)/installed
	$(BIN)/python pretrain.py --seed 0 $(DEMO_PRIOR)
	$(BIN)/python ROME_cifar10.py --seed 0 $(DEMO_FLAGS) --robust_prior checkpoints/$(DEMO_NETWORKS)_seed0-*.pth
	$(BIN)/python evaluate.py --synset result/ROME_res_ROME_Digits_ConvNetW32_1ipc.pt --method ROME-labels-online \
	  --labeller checkpoints/$(DEMO_NETWORKS)_seed0-0.pth $(DEMO_ONLINE)

# Two runs at a time, one thread each. An input line of xargs is a capability and a seed.
demo-table: $(VENV)/installed
	for capability in $(CAPABILITIES); do for seed in 0 1 2 3 4; do echo $$capability $$seed; done; done | \
	OMP_NUM_THREADS=1 xargs -P 2 -L 1 sh -c 'out=result/demo/$$0/seed$$1; \
	  tests/on_processor.sh $$0 $(BIN)/python pretrain.py --seed $$1 $(DEMO_PRIOR) --checkpoint_path $$out/checkpoints && \
	  tests/on_processor.sh $$0 $(BIN)/python ROME_cifar10.py --seed $$1 $(DEMO_FLAGS) --save_path $$out \
	    --checkpoint_path $$out/checkpoints --robust_prior $$out/checkpoints/$(DEMO_NETWORKS)_seed$$1-*.pth'
	$(BIN)/python report.py result/demo --out result/demo/report

CAPABILITIES = $(shell $(PYTHON) tests/machines.py --capabilities)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_FLAGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

test-gpu:
	$(PYTHON) -u tests/gpu.py $(GPU_FLAGS)

benchmark-gpu:
	$(PYTHON) benchmark.py --batch_real 256 --trained_bs 256 --model_train_steps 10 --repeats 3

verify-row: $(VENV)/installed
	$(BIN)/python verify.py $(ROW) $(if $(FILES),--files $(FILES)) $(VERIFY_FLAGS)

test-machines: $(VENV)/installed-test
	$(BIN)/python tests/machines.py $(if $(MACHINES),--machines $(MACHINES)) -- $(PYTEST_FLAGS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, {v} found: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# torchattacks and ddranking pin old packages that the tests do not need: installed without dependencies.
$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pytest pytest-xdist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-torch-*

# Small enough for two CPU cores: four robust networks, 100 iterations, small batches, three networks an evaluation,
# the valid threat model. The last set is kept: with one evaluation there is nothing to select.
DEMO_NETWORKS = full_ConvNetW32_Digits_142_PGD-pixel
DEMO_PRIOR = --dataset Digits --model ConvNetW32 --threat_model pixel --num_nets 4 --epochs 4 --attack_steps 3 --batch_train 64 \
	--lr_net 0.1 --test_limit 50 --aa_limit 0
DEMO_FLAGS = --dataset Digits --model ConvNetW32 --ipc 1 --aug --threat_model pixel --Iteration 100 --eval_interval 100 \
	--batch_real 16 --train_net_num 1 --lr_img 0.02 --embed_last 1000 --ce_weight 0.05 --select last --num_exp 1 \
	--num_eval 3 --epoch_eval_train 100 --test_limit 200 --labels $(LABELS)
# The same set, but the first robust network labels each augmented, mixed batch.
DEMO_ONLINE = --mix both --labels own --num_eval 3 --epoch_eval_train 200 --limit 200 --threat_model pixel --untargeted \
	--attacks PGD20 --eps 2 4 8 --no_sanity --out result/demo_online --resume
