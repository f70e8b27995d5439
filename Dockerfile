# docker build -t lorashrink .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" lorashrink resize -r energy=0.99 lora.safetensors
#
# With an NVIDIA GPU: --build-arg TORCH=https://download.pytorch.org/whl/cu128, and `docker run --gpus all`.
FROM python:3.11-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
COPY constraints.txt /source/
RUN pip install --no-cache-dir -c /source/constraints.txt --index-url "$TORCH" --extra-index-url https://pypi.org/simple torch

COPY pyproject.toml README.md LICENSE /source/
COPY lorashrink /source/lorashrink
COPY comfyui /source/comfyui
COPY plots /source/plots
COPY train /source/train
COPY example /source/example
RUN pip install --no-cache-dir -c /source/constraints.txt "/source[gguf,pictures]" /source/example && rm -r /source

# Caches go here whoever the user is; mount a volume to keep them.
ENV HOME=/cache XDG_CACHE_HOME=/cache
RUN mkdir /cache && chmod 1777 /cache
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["lorashrink"]
