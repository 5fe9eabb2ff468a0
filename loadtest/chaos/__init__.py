"""Faults against gateways, engines and Redis, under streams whose answers can be checked."""
