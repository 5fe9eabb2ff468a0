# Locust with the users of `loadtest/locustfile.py`.
FROM python:3.11.13-slim-bookworm AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV UV_INDEX_URL=${PIP_INDEX_URL} UV_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}
WORKDIR /build
COPY requirements.lock ./
RUN pip install --no-cache-dir uv==0.13.9 \
    && python -m venv /opt/locust \
    && uv pip install --no-cache --python /opt/locust/bin/python \
        --constraint requirements.lock flask locust prometheus-client requests

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin locust
COPY --from=build /opt/locust /opt/locust
WORKDIR /app
COPY loadtest/__init__.py loadtest/locust_metrics.py loadtest/locustfile.py loadtest/sse.py loadtest/
ENV PATH=/opt/locust/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8089
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8089/metrics')"]
ENTRYPOINT ["python3", "-m", "locust"]
CMD ["--locustfile", "loadtest/locustfile.py", "--web-host", "0.0.0.0"]
