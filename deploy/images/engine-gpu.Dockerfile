# vLLM's own image with the plug-in: no fork, nothing of vLLM is replaced.
FROM vllm/vllm-openai:v0.32.0 AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY cache_index cache_index
COPY deploy deploy
COPY engine_adapter engine_adapter
COPY gateway gateway
COPY loadtest loadtest
COPY retrieval retrieval
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
# What of the plug-in's few packages vLLM does not have already.
COPY --from=build /wheels /wheels
RUN python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl msgspec==0.22.0 orjson==3.13.0 \
        psutil==7.2.2 \
    && rm -rf /wheels \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin stream2llm \
    && install --directory --owner 10001 /models
USER 10001
EXPOSE 8100
HEALTHCHECK --interval=5s --timeout=10s --start-period=10m --retries=6 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8100/health')"]
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
