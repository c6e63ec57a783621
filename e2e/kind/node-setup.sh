#!/bin/bash
# Runs once, in a container of the bare Debian that becomes the node image. /stage holds what goes in:
# files/ (kind's own units and scripts), bin/, cni/, images.tar and images.list.
# Argument: the sandbox image's name.
set -euo pipefail
sandbox=$1

install_files() {
  cp -r /stage/files/. /
  chmod 755 /usr/local/bin/* /kind /kind/bin /kind/bin/*
  find /etc/containerd /etc/systemd/system /etc/sysctl.d -type f -exec chmod 644 {} +
  mkdir -p /opt/cni/bin /etc/kubernetes/manifests
  install -m 755 /stage/cni/* /opt/cni/bin/
  install -m 755 /stage/bin/* /usr/bin/
  cp /stage/version /kind/version
  # kind and its scripts look for containerd where a source build would put it.
  ln -sf /usr/bin/containerd /usr/bin/ctr /usr/local/bin/
}

# A container has no hardware, no consoles and no file systems to set up; and what writes to the
# kernel's own registers (binfmt) would write to the machine's.
quiet_systemd() {
  local units=/lib/systemd/system
  rm -f $units/{multi-user,basic,local-fs}.target.wants/* /etc/systemd/system/*.wants/*
  rm -f $units/sockets.target.wants/*{udev,initctl}* $units/sysinit.target.wants/systemd-tmpfiles-setup.service
  rm -f $units/containerd.service   # kind's own is in /etc
  echo 'ReadKMsg=no' >> /etc/systemd/journald.conf
  systemctl -q mask systemd-binfmt.service
  systemctl -q enable kubelet.service containerd.service undo-mount-hacks.service
}

configure_containerd() {
  ctr oci spec | jq 'del(.process.rlimits) | .hooks.createContainer += [{path: "/kind/bin/mount-product-files.sh"}]' \
    > /etc/containerd/cri-base.json
  sed -i "s#^\( *sandbox_image = \).*#\1\"$sandbox\"#" /etc/containerd/config.toml
  # A negative OOM score needs CAP_SYS_RESOURCE, which the machine's root may not have.
  sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' /etc/containerd/config.toml
}

# kubeadm finds its images in the node and pulls none.
load_images() {
  containerd > /tmp/containerd.log 2>&1 &
  local daemon=$!
  for _ in $(seq 100); do ctr version > /dev/null 2>&1 && break; sleep 0.1; done
  ctr -n k8s.io images import --no-unpack --digests /stage/images.tar > /dev/null || { tail /tmp/containerd.log; exit 1; }
  diff <(ctr -n k8s.io images list -q | grep -vE '^sha256:|@' | sort) <(sort /stage/images.list)
  kill $daemon; wait $daemon || true
  rm -rf /run/containerd/* /tmp/containerd.log
}

install_files
quiet_systemd
configure_containerd
load_images
