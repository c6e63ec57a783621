# The same image as `make image`, for who has a registry: docker build -t tidegate:dev .
#
# Both are made by image/build.py from Debian 12 packages, so they hold the same files. One image for
# the operator, the node loader and the command line; which one is said by `command` where it runs.

FROM debian:12 AS build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends ca-certificates gcc make python3-venv
WORKDIR /src
COPY . .
# `cni` is there from when the CNI step is; `objects` installs the compiler it needs.
RUN make objects $(make -qpRr 2>/dev/null | grep -o '^cni:' | tr -d :)
RUN python3 -m venv /venv && /venv/bin/pip install -q 'hatchling>=1.27'
RUN mkdir /image && TIDEGATE_CACHE=/tmp/cache /venv/bin/python image/build.py --rootfs /image

FROM scratch
COPY --from=build /image/ /
ENV PATH=/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUTF8=1
LABEL org.opencontainers.image.title=tidegate \
      org.opencontainers.image.description="operator, node loader and command line" \
      org.opencontainers.image.licenses=Apache-2.0
# The operator's; the loader's DaemonSet asks for root and drops what it can.
USER 65532:65532
CMD ["tidegate", "--help"]
