#!/bin/sh
# Installs one set of packages, at the pinned versions and as wheels only, into /opt/venv, and leaves out what is never
# run there: pip, the packages' own tests, static libraries, and ONNX Runtime's tools that make and change models.
set -eu

python -m venv --without-pip /opt/venv
python -m pip --python /opt/venv/bin/python install --only-binary :all: \
    --constraint requirements/constraints.txt --requirement "$1"

find /opt/venv -type d -name tests -prune -exec rm -rf {} +
for name in transformers tools quantization datasets; do
    rm -rf /opt/venv/lib/python3.11/site-packages/onnxruntime/"$name"
done
find /opt/venv -name '*.a' -delete
