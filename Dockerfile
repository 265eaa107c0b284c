# A small unprivileged server on a CPU. docs/install.md shows how to run it.
FROM python:3.12-slim AS build
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
# On a CPU, leave out the CUDA libraries: 1.2 GB from faiss-gpu and 2 GB from PyPI's torch.
RUN pip install --no-cache-dir uv && uv pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY retrieval_tip retrieval_tip
RUN echo "faiss-gpu ; sys_platform == 'never'" > overrides.txt \
    && uv pip install '.[serve]' --override overrides.txt && uv pip install 'faiss-cpu>=1.15.1,<2' && uv pip uninstall uv

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 tip && mkdir /cache /indexes && chown tip /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH RETRIEVAL_TIP_CACHE=/cache HF_HOME=/cache/huggingface
USER tip
VOLUME ["/cache", "/indexes"]
EXPOSE 8000
ENTRYPOINT ["retrieval-tip"]
CMD ["serve", "/indexes/things", "--host", "0.0.0.0"]
