#!/bin/bash
# Starts a run on all hosts of a Cloud TPU slice, from your own machine with gcloud:
#   TPU=jrlhf ZONE=us-east5-a TYPE=v5p-32 IMAGE=v2-alpha-tpuv5 SHARE=10.0.0.2:/share configs/launch/cloud-tpu.sh
# SHARE is an NFS export (Filestore) with a checkout in jrlhf/; all hosts mount it and write the run there. JAX learns the
# index of each process from its machine. The script creates a preempted slice again. After that, or after an error, the
# same command resumes from the newest checkpoint, at most ATTEMPTS times.
set -u
tpu=${TPU:?name of the TPU VM}
zone=${ZONE:?its zone}
type=${TYPE:?its accelerator type}
image=${IMAGE:?its software version}
share=${SHARE:?NFS export that all hosts mount, address:/path}
config=${CONFIG:-configs/llama-3.2-1b-hh.yaml}
run=${RUN:-runs/llama-3.2-1b-hh}
attempts=${ATTEMPTS:-5}

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$1"
}

make_ready() {
    local state
    state=$(gcloud compute tpus tpu-vm describe "$tpu" --zone="$zone" --format='value(state)' 2>/dev/null)
    if [[ $state != READY ]]; then
        if [[ -n $state ]]; then
            gcloud compute tpus tpu-vm delete "$tpu" --zone="$zone" --quiet
        fi
        gcloud compute tpus tpu-vm create "$tpu" --zone="$zone" --accelerator-type="$type" --version="$image" --spot ||
            return
    fi
    on_all_hosts "sudo mkdir -p /share && (mountpoint -q /share || sudo mount -t nfs $share /share)" &&
        on_all_hosts "pip install -q /share/jrlhf 'jax[tpu]'"
}

code=1
for ((attempt = 1; attempt <= attempts; attempt++)); do
    if make_ready; then
        on_all_hosts "cd /share/jrlhf && jrlhf pipeline --config $config --run $run"
        code=$?
        if ((code == 0)); then
            exit 0
        fi
    fi
    echo "attempt $attempt of $attempts did not finish the run" >&2
    if ((attempt < attempts)); then
        sleep "${PAUSE:-60}"
    fi
done
exit "$code"
