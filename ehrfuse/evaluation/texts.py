"""Written texts against those that a model writes, by the libraries that papers quote."""

import numpy as np
import pandas as pd
from sklearn.utils.validation import check_consistent_length

from ehrfuse._runtime import import_optional

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_scores(references, predictions):
    """BLEU, chrF and ROUGE of texts against those that somebody wrote.

    Parameters
    ----------
    references : Series or list of str
        What was written. Rows that are null are left out: nothing is known of them.
    predictions : Series or list of str
        What the model writes for the same rows, matched by position. Null counts as an empty text.

    Returns
    -------
    scores : dict of str to float
        Each from 0 to 1, 1 for equal texts. ``"bleu"`` and ``"chrf"`` of the whole set of texts, as
        sacrebleu computes them by default; ``"rouge1"``, ``"rouge2"`` and ``"rougeL"``, the mean F
        over rows, as rouge-score computes it without a stemmer.

    Raises
    ------
    ValueError
        If the lengths differ, or every reference is null.
    ImportError
        Without the packages, which ``pip install 'ehrfuse[textscores]'`` brings.

    See Also
    --------
    ehrfuse.NoteGenerator : Writes texts from records.

    Notes
    -----
    All five compare words or letters. A text that denies what the other one states can score high,
    so that none of them says whether a note is true. ROUGE reads Latin letters and digits alone;
    for other scripts take chrF.

    References
    ----------
    Post: A call for clarity in reporting BLEU scores. WMT 2018.

    Lin: ROUGE: a package for automatic evaluation of summaries. ACL workshop 2004.

    Examples
    --------
    >>> from ehrfuse.evaluation import text_scores
    >>> scores = text_scores(["fever and cough for two days"], ["fever and cough since Monday"])
    >>> {name: round(value, 2) for name, value in scores.items()}
    {'bleu': 0.33, 'chrf': 0.56, 'rouge1': 0.55, 'rouge2': 0.44, 'rougeL': 0.55}
    """
    sacrebleu = import_optional("sacrebleu", "textscores")
    rouge = import_optional("rouge_score.rouge_scorer", "textscores")
    check_consistent_length(references, predictions)
    written, made = (_texts(x) for x in (references, predictions))
    known = [
        (r, "" if p is None else p) for r, p in zip(written, made, strict=True) if r is not None
    ]
    if not known:
        raise ValueError("references holds no text; give rows of which the written text is known.")
    written, made = map(list, zip(*known, strict=True))
    scorer = rouge.RougeScorer(list(ROUGE))
    rows = [scorer.score(r, p) for r, p in known]
    # force: notes may come with spaces before their full stops, and no warning is due.
    return {
        "bleu": min(1.0, sacrebleu.BLEU(force=True).corpus_score(made, [written]).score / 100),
        "chrf": sacrebleu.CHRF().corpus_score(made, [written]).score / 100,
        **{name: float(np.mean([row[name].fmeasure for row in rows])) for name in ROUGE},
    }


def _texts(cells):
    """A list of str and None; never says what stands in a cell."""
    cells = pd.Series(list(cells), dtype=object)
    found = [None if null else cell for cell, null in zip(cells, cells.isna(), strict=True)]
    odd = next((i for i, cell in enumerate(found) if not isinstance(cell, str | None)), None)
    if odd is not None:
        raise ValueError(
            f"Row {odd} holds {type(found[odd]).__name__}; texts must be str, or null where there "
            "is none."
        )
    return found
