"""What each tenant has used at this replica, and may still use.

Replicas do not tell each other, so a tenant may use its limits at each of them. Requests are
counted where they come in; tokens and open streams where the stream is held.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.errors import RateLimited
from gateway.quota import NEVER_USED_S, Rate, duration
from gateway.tenants import Tenant, Tenants


@dataclass(slots=True)
class Account:
    """One tenant's."""

    tenant: Tenant
    """As the file has it now, or had it last; a request may be older."""
    streams: int = 0
    """Not ended."""
    requests_full_s: float = NEVER_USED_S
    tokens_full_s: float = NEVER_USED_S

    def ask(self) -> None:
        """A request for a stream or an answer, to be counted unless it is refused.

        Raises:
            RateLimited
        """
        self.check_tokens()
        rate, now_s = self._requests, time.monotonic()
        if rate is not None:
            _check(rate, self.requests_full_s, now_s, "requests")
            self.requests_full_s = rate.spent(self.requests_full_s, now_s, 1)

    def check_tokens(self) -> None:
        """Whether more tokens may come. How many a text has is known only when it is tokenized, so
        the last one before a refusal may cost more than was left; that is owed.

        Raises:
            RateLimited
        """
        if (rate := self._tokens) is not None:
            _check(rate, self.tokens_full_s, time.monotonic(), "tokens")

    def check_streams(self) -> None:
        """Whether one more stream may be opened.

        Raises:
            RateLimited
        """
        most = self.tenant.streams
        if most is not None and self.streams >= most:
            raise RateLimited(
                f"{self.streams} streams are open, which is the most", limit="streams"
            )

    def spend(self, tokens: int) -> None:
        """Context was taken in, or an answer given."""
        if (rate := self._tokens) is not None:
            self.tokens_full_s = rate.spent(self.tokens_full_s, time.monotonic(), tokens)

    def headers(self) -> Iterator[tuple[str, str]]:
        """What a response tells of the limits."""
        now_s = time.monotonic()
        if (rate := self._requests) is not None:
            yield from _headers("requests", rate, self.requests_full_s, now_s)
        if (rate := self._tokens) is not None:
            yield from _headers("tokens", rate, self.tokens_full_s, now_s)

    @property
    def _requests(self) -> Rate | None:
        most = self.tenant.requests_per_minute
        return None if most is None else Rate(most)

    @property
    def _tokens(self) -> Rate | None:
        most = self.tenant.tokens_per_minute
        return None if most is None else Rate(most)


def _check(rate: Rate, full_s: float, now_s: float, what: str) -> None:
    if (wait_s := rate.wait_s(full_s, now_s)) > 1e-9:
        raise RateLimited(
            f"{rate.per_minute} {what} per minute are used up; try again in {duration(wait_s)}",
            retry_s=math.ceil(wait_s),
            limit=what,
        )


def _headers(what: str, rate: Rate, full_s: float, now_s: float) -> Iterator[tuple[str, str]]:
    yield f"x-ratelimit-limit-{what}", str(rate.per_minute)
    yield f"x-ratelimit-remaining-{what}", str(rate.left(full_s, now_s))
    yield f"x-ratelimit-reset-{what}", duration(rate.reset_s(full_s, now_s))


class Accounts:
    """Those of all tenants."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def use(self, tenants: Tenants) -> None:
        """Go by the limits that these tenants have, also for what is open already."""
        for name, account in self._accounts.items():
            account.tenant = tenants.named(name) or account.tenant

    def of(self, tenant: Tenant) -> Account:
        """A tenant's."""
        return self._accounts.setdefault(tenant.name, Account(tenant))

    def share(self, account: Account) -> float:
        """Of what there is, by the weights of this tenant and of those with open streams."""
        others = sum(a.tenant.weight for a in self._accounts.values() if a.streams)
        own = account.tenant.weight
        return own / (others if account.streams else others + own)
