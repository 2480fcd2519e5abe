# make demo | make test: each works alone in a fresh clone, and again without reinstalling.
PYTHON ?= python3.11
BIN := .venv/bin

# glibc would give every large block back to the system and fetch it anew, which a U-Net feels.
LAB := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=200000000 \
	$(BIN)/python -m g4seg_pl.lab

# Generators of growing training, from the history of this repository (not in a shallow clone).
CHECKPOINTS := $(addprefix outputs/lab/checkpoints/,first 4350-steps 8750-steps)
outputs/lab/checkpoints/first: COMMIT := e3a9026
outputs/lab/checkpoints/4350-steps: COMMIT := 6bffbcb
outputs/lab/checkpoints/8750-steps: COMMIT := 81bb0f3

.PHONY: demo test lint lab loop clean

.venv/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/test.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@ .venv/run.stamp

demo: .venv/run.stamp
	$(BIN)/g4seg demo

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

# From nothing: 102 minutes on two cores of an AMD EPYC with AVX-512. Every part resumes and can be run
# by itself. Settings are chosen, and tables made, side by side, a thread each, in $(PROCESSES)
# processes: results are kept by what determines them, wherever they were made.
PROCESSES ?= 2
ONE := OMP_NUM_THREADS=1 $(LAB)
CHOICES := choose-gradcam choose-degraded choose-cross_attention
TABLES := lab-sensitivity lab-signals lab-makers lab-refiners lab-groups lab-words lab-claim \
	lab-likelihood lab-rest
.PHONY: lab-cam lab-chosen $(CHOICES) $(TABLES)
lab: .venv/test.stamp $(CHECKPOINTS)
	$(MAKE) -j$(PROCESSES) AFTER=lab-chosen $(CHOICES) lab-cam $(TABLES)
	$(LAB) costs failures signal_pictures report

# A table by itself takes the settings that are there; in `make lab` all of them wait for new ones.
$(TABLES): $(AFTER)

$(CHOICES): choose-%:
	$(ONE) choose --kinds $* --results outputs/lab/$@

lab-chosen: $(CHOICES)  # all kinds, from the results these have kept
	$(ONE) choose

lab-cam:  # the classifier of makers: without bfloat16 half an hour, for which nothing else waits
	$(ONE) cam
lab-sensitivity:
	$(ONE) sensitivity
lab-signals:
	$(ONE) signals --kinds gradcam --noise-seeds 1
lab-groups:
	$(ONE) groups --kinds gradcam
lab-words: $(CHECKPOINTS)
	$(ONE) words --kinds gradcam --noise-seeds 1 --checkpoints $(CHECKPOINTS)
lab-refiners:
	$(ONE) refiners modules
	$(ONE) controls --kinds gradcam  # those of the other kinds are among the refiners
lab-likelihood:
	$(ONE) likelihood --kinds gradcam --noise-seeds 1
lab-makers: lab-cam
	$(ONE) makers --images 150 --noise-seeds 1
lab-claim:
	$(ONE) claim
lab-rest:
	$(ONE) decoders --kinds gradcam --noise-seeds 1
	$(ONE) open_vocabulary --noise-seeds 1

$(CHECKPOINTS):
	mkdir -p $@
	git archive $(COMMIT) g4seg_pl/world/weights/generator | tar -x -C $@ --strip-components=4 \
		|| { rm -r $@; exit 1; }

# Trains fifteen small networks; resumes where it was killed.
loop: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m g4seg_pl.segmentation.loop --processes $(PROCESSES)

clean:
	rm -rf .venv outputs
