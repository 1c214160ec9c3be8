"""Peak memory of training runs of growing length, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
from pathlib import Path

LENGTHS = (200_000, 800_000, 3_200_000)


def peak_mib(n_tokens: int) -> float:
    from tclib.models.language_model import LanguageModel
    from tclib.text.corpus import CorpusConfig, build_corpus
    from tclib.training.spec import DictionarySpec, TrainingConfig
    from tclib.training.train import train

    lm = LanguageModel.load("demo")
    rows = build_corpus(CorpusConfig(n_train_tokens=100_000, n_eval_tokens=1_000), lm).train
    spec = DictionarySpec("transcoder", 2, expansion=8, l1_coefficient=1e-3)
    config = TrainingConfig(n_tokens=n_tokens, batch_size=512, block_rows=512)
    with tempfile.TemporaryDirectory() as folder:
        train(lm, rows, [spec], config, Path(folder) / "run")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    for n_tokens in LENGTHS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(f"{n_tokens:9,} tokens   peak {pool.apply(peak_mib, (n_tokens,)):7.0f} MiB")


if __name__ == "__main__":
    main()
