"""What the reading processes of a loader do when they begin."""

import signal


def outlive_sigterm(worker: int) -> None:
    """Let a reading process go on when SIGTERM is sent to every process of a run.

    Clusters and `timeout` send it so. The main process ends behind its batch, and the death of a
    reader would end it in the middle. Readers end when the main process tells them to, or is gone.

    A function of the module, for a loader's processes may have to unpickle it.

    Args:
        worker: its number, from 0.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
