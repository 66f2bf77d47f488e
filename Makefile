# `make demo` and `make test` set everything up by themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

DIGITS := --arch mobilenet_v1 --data_set digits --image_size 64 --train_batch_size 64
OUT := experiments/demo

# The inner loop, under a minute on two cores: options, recipes, data, and methods on all but the large networks. Small
# tensors are faster in one thread.
QUICK := $(patsubst %,tests/test_%.py,house options utils configs data pruning bip)

.PHONY: demo test slow quick lint format

demo: $(READY)
	$(BIN)/python imagenet.py $(DIGITS) --conv_type DenseConv --num_epochs 10 --lr 0.05 --job_dir $(OUT)/dense
	$(BIN)/python imagenet.py $(DIGITS) --conv_type BlockL1Conv --N 4 --pr_target 0.5 --rearrange \
		--pretrained_model $(OUT)/dense/checkpoint/final.pt --num_epochs 6 --lr 0.02 --export_onnx --job_dir $(OUT)/1x4
	$(BIN)/python model_tune.py --onnx_path $(OUT)/1x4/model.onnx --bsr 4 --bsc 1 --sparsity 0.5 --threads 1

# Two processes of one thread each: on two cores, two with two threads each would wait for one another.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK) -k "not resnet50 and not mobilenet"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
