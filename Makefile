# make demo   install into .venv and distil the embedded digits (3 minutes on two CPU cores)
# make test   install into .venv and run the tests
# make test-slow   the tests marked slow: ten kills of a real run, a full pool saved
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow clean

demo: $(VENV)/installed
	$(BIN)/python ROME_cifar10.py $(DEMO_FLAGS)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_FLAGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, {v} found: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# torchattacks pins an old requests that it never imports: installed without its dependencies, and for tests only.
$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pytest pytest-xdist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV)

# Small enough for two CPU cores: 25 iterations, little batches, 3 networks an evaluation, the valid threat model.
DEMO_FLAGS = --dataset Digits --model ConvNetW32 --ipc 1 --aug --threat_model pixel --Iteration 25 --eval_interval 25 \
	--batch_real 32 --trained_bs 32 --model_train_steps 2 --train_net_num 1 --net_generate_interval 5 --lr_img 0.2 \
	--net_decay --embed_last 1000 --ce_weight 0.5 --num_exp 1 --num_eval 3 --epoch_eval_train 100
