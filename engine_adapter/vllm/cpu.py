"""Entry of `vllm.general_plugins`: two things that vLLM 0.32 lacks on CPUs, and only there.

- A request with a seed whose prompt is computed in more than one step ends the engine: vLLM takes
  back what a step has drawn for nothing by an offset that a CPU's generator does not have. Here the
  generator gets its state back instead, so that the draws do not depend on the steps either.
- NIXL 1.5 has a thread poll its sockets without a pause, whatever vLLM is told: on a machine with
  few cores each engine with the connector takes one of them for nothing.

`stream2llm` brings both along; engines without that plug-in name `stream2llm_cpu` in
`VLLM_PLUGINS`.
"""

from __future__ import annotations

from typing import Any

PAUSE_US = 1000
"""Longest wait of NIXL's thread; what arrives wakes it before."""


def install() -> None:
    """Repair both. vLLM calls it in each of its processes, possibly more than once."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _rewind_generators()
        _pause_nixl()


def _rewind_generators() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, keep_books = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync
    if hasattr(sample, "__wrapped__"):
        return

    def sample_and_rewind(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(g, g.get_state()) for g in _for_nothing(self).values()]
        sampled = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return sampled

    def keep_books_without(self: Any, *args: Any, **kwargs: Any) -> Any:
        rewound, generators = _for_nothing(self), self.input_batch.generators
        for index in rewound:
            del generators[index]
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            generators.update(rewound)

    sample_and_rewind.__wrapped__ = sample  # type: ignore[attr-defined]
    CPUModelRunner._sample = sample_and_rewind
    CPUModelRunner._bookkeeping_sync = keep_books_without


def _for_nothing(runner: Any) -> dict[int, Any]:
    """The generators of requests whose prompts this step does not complete, by their places."""
    places = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    generators = runner.input_batch.generators
    return {int(i): generators[int(i)] for i in places if int(i) in generators}


def _pause_nixl() -> None:
    try:
        from nixl._api import nixlBind
    except ImportError:
        return  # no NIXL, nothing to pause
    make_agent = nixlBind.nixlAgent
    if hasattr(make_agent, "__wrapped__"):
        return

    def paused_agent(name: str, config: Any) -> Any:
        config.pthrDelay = PAUSE_US
        return make_agent(name, config)

    paused_agent.__wrapped__ = make_agent  # type: ignore[attr-defined]
    nixlBind.nixlAgent = paused_agent
