"""Networks of diffusers and transformers whose every weight comes from their files."""

from collections.abc import Callable
from typing import Any

_NAMED = 3


def load_whole(
    load: Callable[..., Any], *place: Any, unused: tuple[str, ...] = (), **options: Any
) -> Any:
    """Return the network that ``from_pretrained`` loads, if its files hold all of it.

    Where a weight is missing, both libraries go on with random numbers, or with what happens to
    lie in memory, and only log it.

    Args:
        load: ``from_pretrained`` of a class.
        place: its folder or hub id.
        unused: beginnings of the names of weights that nobody will use.
        options: further arguments of ``load``.

    Raises:
        ValueError: weights are missing or of another shape; names the first ones.
    """
    # Mismatches are left to the check below: what either library says of them helps nobody.
    network, info = load(*place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    own = network.state_dict()
    other = {*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])}
    lacking = sorted(
        name
        for name in other
        # Whole numbers (ids of positions, counts of batches) follow from the class, none is learnt.
        if not name.startswith(unused) and (name not in own or own[name].is_floating_point())
    )
    if lacking:
        names = ", ".join(lacking[:_NAMED]) + (", ..." if len(lacking) > _NAMED else "")
        message = (
            f"{len(lacking)} of the {len(own)} weights of {type(network).__name__} are not in "
            f"its files, or not in this shape: {names}; another kind of model, or a part of one"
        )
        raise ValueError(message)
    return network
