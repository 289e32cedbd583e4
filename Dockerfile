# docker build -t streamconv . && docker run --rm -v /runs:/runs:ro -v /models:/models streamconv \
#     /runs/grpo/global_step_100/actor /models/grpo-100 --max-mem 8GB
FROM python:3.12-slim
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /src/
COPY streamconv /src/streamconv
COPY scripts/deploy /src/scripts/deploy
RUN pip install --no-cache-dir /src && useradd --create-home --uid 1000 streamconv
# Unfinished runs are sealed with a key that lies here: keep it in a volume to resume in a new container.
ENV XDG_STATE_HOME=/state
RUN install -d -o streamconv /state
VOLUME /state
USER streamconv
ENTRYPOINT ["streamconv"]
CMD ["--help"]
