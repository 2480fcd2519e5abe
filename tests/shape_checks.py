"""The type checker that jaxtyping's import hook applies under pytest."""

from beartype import BeartypeConf, beartype

# As in Python's own numeric tower, an int may stand where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
