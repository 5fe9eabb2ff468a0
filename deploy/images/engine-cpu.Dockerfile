# vLLM for CPUs with the plug-in, and the small model that comes as a package.
FROM python:3.11.13-slim-bookworm AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /build
# Every package by its pin and without its dependencies, as `make setup` does; PyTorch by pip alone.
COPY requirements.lock ./
RUN python -m venv /opt/stream2llm \
    && /opt/stream2llm/bin/pip install --no-cache-dir --no-deps torch==2.13.0 \
    && /opt/stream2llm/bin/pip install --no-cache-dir --no-deps -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY cache_index cache_index
COPY deploy deploy
COPY engine_adapter engine_adapter
COPY gateway gateway
COPY loadtest loadtest
COPY retrieval retrieval
RUN /opt/stream2llm/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.13-slim-bookworm
# Versions of the distribution are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin stream2llm \
    && install --directory --owner 10001 /models
COPY --from=build /opt/stream2llm /opt/stream2llm
ENV PATH=/opt/stream2llm/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8100
HEALTHCHECK --interval=5s --timeout=10s --start-period=10m --retries=6 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8100/health')"]
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
