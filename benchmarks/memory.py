"""Peak memory of training runs of two lengths, each in a process of its own."""

import tempfile
from pathlib import Path

from result import Result, in_own_process, peak_gib


def run(small: bool) -> Result:
    """The bundled model's transcoder on sixteen times as many tokens. Target: the same peak.

    With all activations in memory the long run would take 3.3 GB more; 0.13 of 0.47 at the small size.
    """
    short, long, block_rows = (8_192, 131_072, 32) if small else (200_000, 3_200_000, 512)
    peaks = [in_own_process(peak_of_training, n, block_rows) for n in (short, long)]
    ratio = peaks[1] / peaks[0]
    return Result(
        {"n_tokens_short": short, "n_tokens_long": long},
        {
            f"peak memory of training on {long:,} tokens of the demo": (peaks[1], "GiB"),
            "the same over a sixteenth of the tokens": (ratio, ""),
        },
        {"peak memory, that of a sixteenth of the tokens": (abs(ratio - 1), 0.15)},
    )


def peak_of_training(n_tokens: int, block_rows: int) -> float:
    from tclib.models.language_model import LanguageModel
    from tclib.text.corpus import CorpusConfig, build_corpus
    from tclib.training.spec import DictionarySpec, TrainingConfig
    from tclib.training.train import train

    lm = LanguageModel.load("demo")
    rows = build_corpus(CorpusConfig(n_train_tokens=100_000, n_eval_tokens=1_000), lm).train
    spec = DictionarySpec("transcoder", 2, expansion=8, l1_coefficient=1e-3)
    config = TrainingConfig(n_tokens=n_tokens, batch_size=512, block_rows=block_rows)
    with tempfile.TemporaryDirectory() as folder:
        train(lm, rows, [spec], config, Path(folder) / "run")
    return peak_gib()
