"""What a person sees of a batch, in words: a line while it runs, a few at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .progress import duration

if TYPE_CHECKING:
    from ..batch.runner import BatchProgress, InputCheck, Recovered


PACE_SECONDS = 5.0


class Pace:
    """How many tokens a second come, smoothed over some seconds.

    Tokens are counted when an answer ends, and answers often end together: each lot counts for the
    time since the one before, with a weight that grows with that time.
    """

    def __init__(self) -> None:
        self._tps = 0.0
        self._seen = (0.0, 0)  # when the last lot came, and the tokens until then

    def __call__(self, seconds: float, n_tokens: int) -> float:
        """Tokens per second by now, given the time and the tokens so far."""
        before, n_before = self._seen
        since = seconds - before
        if n_tokens > n_before and since > 0:
            tps = (n_tokens - n_before) / since
            weight = -math.expm1(-since / PACE_SECONDS) if n_before else 1.0
            self._tps += weight * (tps - self._tps)
            self._seen = (seconds, n_tokens)
            return self._tps
        # nothing for a while: it can't be that fast any more
        return self._tps * min(1.0, PACE_SECONDS / since) if since > 0 else self._tps


def progress_line(progress: BatchProgress, tps: float) -> str:
    """`12 of 500 done, 1 failed, 85 tok/s (80 on average), 41 % of prompts shared, 3 min left`."""
    parts = [f"{progress.n_ended:,} of {progress.n_total:,} done"]
    if progress.n_failed:
        parts.append(f"{progress.n_failed:,} failed")
    if progress.completion_tokens:
        average = progress.completion_tokens / max(progress.seconds, 1e-9)
        parts.append(f"{tps:.0f} tok/s ({average:.0f} on average)")
    if progress.cached_tokens:
        parts.append(f"{shared(progress):.0%} of prompts shared")
    if progress.n_ended:
        left = progress.seconds / progress.n_ended * (progress.n_total - progress.n_ended)
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def shared(progress: BatchProgress) -> float:
    """The share of prompt tokens that were held from another request."""
    return progress.cached_tokens / progress.prompt_tokens if progress.prompt_tokens else 0.0


def check_line(checked: InputCheck, recovered: Recovered | None) -> str:
    """What is about to be asked: `500 requests: 120 are done already, 3 can't be asked.`"""
    parts = []
    if checked.n_done:
        parts.append(f"{checked.n_done:,} are done already")
    if checked.n_bad:
        parts.append(f"{checked.n_bad:,} can't be asked")
    if checked.n_truncated:
        parts.append(f"{checked.n_truncated:,} are cut to fit the context")
    if checked.n_partly_held:
        parts.append(f"{checked.n_partly_held:,} have schemas that are partly checked at the end")
    if recovered is not None and recovered.n_cut_bytes:
        parts.append(f"{recovered.n_cut_bytes:,} bytes of a line left unfinished were taken off")
    said = f": {', '.join(parts)}" if parts else ""
    return f"{checked.n_lines:,} request{'s' * (checked.n_lines != 1)}{said}."


def summary_lines(progress: BatchProgress, n_errors: int) -> list[str]:
    """How it went: requests, tokens, time, what sharing saved."""
    n, seconds = progress.n_answered, progress.seconds
    lines = []
    if progress.n_total:
        tps = progress.completion_tokens / seconds if seconds else 0.0
        lines.append(
            f"{n:,} answered in {precise(seconds)}: {progress.prompt_tokens:,} prompt tokens, "
            f"{progress.completion_tokens:,} generated, {tps:.1f} tok/s."
        )
        if progress.cached_tokens:
            lines.append(f"Sharing saved {shared(progress):.0%} of the prompt tokens.")
    if progress.n_deaths:
        lines.append(f"The engine died and was started again {times(progress.n_deaths)}.")
    if n_errors:
        lines.append(
            f"{n_errors:,} failed: see the lines with an error; --retry-errors asks again."
        )
    return lines


def precise(seconds: float) -> str:
    """A duration, with tenths below a minute."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def times(n: int) -> str:
    """A number of times in words."""
    return "once" if n == 1 else f"{n} times"


def summary_document(
    checked: InputCheck, progress: BatchProgress, n_errors: int, interrupted: bool
) -> Any:
    """The document of --json."""
    return {
        "requests": checked.n_lines,
        "done_before": checked.n_done,
        "refused": checked.n_bad,
        "truncated": checked.n_truncated,
        "answered": progress.n_answered,
        "failed": progress.n_failed,
        "errors": n_errors,
        "interrupted": interrupted,
        "engine_deaths": progress.n_deaths,
        "usage": {
            "prompt_tokens": progress.prompt_tokens,
            "completion_tokens": progress.completion_tokens,
            "cached_tokens": progress.cached_tokens,
        },
        "seconds": round(progress.seconds, 3),
    }
