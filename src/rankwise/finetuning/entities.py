"""Named entities in tags of the BIO kind, and how many of them were found."""

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
_BIO = re.compile(r"([BI])-(.+)")
Entity = tuple[str, int, int]


def are_bio_tags(tags: Iterable[str]) -> bool:
    """Whether all are ``O``, ``B-x`` or ``I-x``, and at least one begins with B or I.

    Example:
        >>> from rankwise.finetuning.entities import are_bio_tags
        >>> are_bio_tags(["O", "B-PER", "I-PER"]), are_bio_tags(["NOUN", "VERB"])
        (True, False)
    """
    names = set(tags)
    return bool(names - {OUTSIDE}) and all(tag == OUTSIDE or _BIO.fullmatch(tag) for tag in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Entities as (type, first word, word after the last).

    Read as CoNLL's own script reads them: ``B-x`` begins an entity, and so does ``I-x`` where it does not go on with one
    of type x.

    Example:
        >>> from rankwise.finetuning.entities import entities
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC"]))
        [('LOC', 3, 4), ('PER', 0, 2)]
    """
    found: set[Entity] = set()
    kind, start = None, 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        match = _BIO.fullmatch(tag)
        if kind is not None and not (match and match[1] == "I" and match[2] == kind):
            found.add((kind, start, place))
            kind = None
        if kind is None and match:
            kind, start = match[2], place
    return found


def entity_scores(predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Precision, recall and F1 over all entities of all rows; an entity is found if its type and both ends are.

    None where there is nothing to divide by: no entity predicted (precision), none there (recall), neither (F1).
    """
    right = guessed = there = 0
    for predicted, true in zip(predictions, targets, strict=True):
        a, b = entities(predicted), entities(true)
        right, guessed, there = right + len(a & b), guessed + len(a), there + len(b)
    return {
        "entity_f1": 2 * right / (guessed + there) if guessed + there else None,
        "entity_precision": right / guessed if guessed else None,
        "entity_recall": right / there if there else None,
    }
