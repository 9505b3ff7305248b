# docker build -t patchcert .                                                        # CPU
# docker build -t patchcert:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .    # torch's CUDA build; run with --gpus all
# docker run --rm -v "$PWD/runs:/app/runs" patchcert certify --patch 5
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision
COPY . /src
RUN pip install --no-cache-dir "/src[plots,timm]" && rm -rf /src
WORKDIR /app
ENTRYPOINT ["patchcert"]
CMD ["--help"]
