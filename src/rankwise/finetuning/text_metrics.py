"""BLEU, ROUGE and METEOR of generated texts, each by a maintained package."""

from itertools import zip_longest

import numpy as np

from rankwise.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def require_text_metrics() -> None:
    """Refuse now what would fail after hours of training.

    Raises:
        UserError: sacrebleu or rouge-score is missing.
    """
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"scoring generated text needs more packages ({error.name} is missing): pip install 'rankwise[generation]'"
        ) from None


def bleu(texts: list[str], references: list[tuple[str, ...]]) -> float | None:
    """Corpus BLEU in [0, 1]; None without texts."""
    import sacrebleu

    if not texts:
        return None
    # sacrebleu wants the first references of all rows, then the second ...; None where a row has no more
    by_rank = [list(stream) for stream in zip_longest(*references)]
    score = sacrebleu.corpus_bleu(texts, by_rank, force=True).score  # force: no advice on tokenized text in the log
    return min(float(score) / 100, 1.0)  # a perfect score comes as 100.00000000000004


def rouge(texts: list[str], references: list[tuple[str, ...]]) -> dict[str, float | None]:
    """F-measures of the best reference, mean over texts."""
    from rouge_score.rouge_scorer import RougeScorer

    if not texts:
        return dict.fromkeys(ROUGE)
    scorer = RougeScorer(list(ROUGE))
    rows = [scorer.score_multi(list(known), text) for text, known in zip(texts, references, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in ROUGE}


def meteor_names() -> tuple[str, ...]:
    """``meteor`` where WordNet is on the machine, else nothing."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return ()
    return ("meteor",)


def meteor(texts: list[str], references: list[tuple[str, ...]]) -> dict[str, float | None]:
    """METEOR of the best reference, mean over texts; empty where WordNet is not on the machine."""
    if not meteor_names():
        return {}
    if not texts:
        return {"meteor": None}
    from nltk.corpus import wordnet
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import meteor_score

    words = NLTKWordTokenizer().tokenize  # word_tokenize would look for a sentence model
    rows = [
        meteor_score([words(known) for known in several], words(text), wordnet=wordnet)
        for text, several in zip(texts, references, strict=True)
    ]
    return {"meteor": float(np.mean(rows))}
