# A small unprivileged server on a CPU. docs/install.md shows how to run it.
FROM python:3.12-slim AS build
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY .ci/backend.py .ci/
COPY pyproject.toml README.md LICENSE ./
COPY retrieval_tip retrieval_tip
# Leave out the CUDA libraries: 1.2 GB from faiss-gpu and 2 GB from PyPI's torch.
RUN RETRIEVAL_TIP_FAISS=cpu pip install --no-cache-dir . --extra-index-url https://download.pytorch.org/whl/cpu

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 tip && mkdir /cache /indexes && chown tip /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH RETRIEVAL_TIP_CACHE=/cache HF_HOME=/cache/huggingface
USER tip
VOLUME ["/cache", "/indexes"]
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/healthz')"]
ENTRYPOINT ["retrieval-tip"]
CMD ["serve", "/indexes/things", "--host", "0.0.0.0"]
