#!/usr/bin/env bash
# Asks a running stack everything once and says what does not answer: every task and route of the service, and whether
# Prometheus scrapes it. Run it in the repository's root after `docker compose up`; needs curl.
#
#     docker/smoke.sh [SERVICE] [PROMETHEUS]       default http://127.0.0.1:8000 http://127.0.0.1:9090
#
# API_KEY in the environment is sent along, for a service that asks for one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
service=${1:-http://127.0.0.1:8000}
prometheus=${2:-http://127.0.0.1:9090}
credentials=(${API_KEY:+--header "Authorization: Bearer $API_KEY"})

ask() { # ask PART URL [CURL OPTION…]: the answer is a success and holds the part
    local part=$1 url=$2 answer
    shift 2
    answer=$(curl --silent --show-error --fail --max-time 30 "${credentials[@]}" "$@" "$url" | tr -d '\0')
    grep --quiet --text --fixed-strings -- "$part" <<<"$answer" || {
        echo "FAILED $url: no $part in ${answer:0:300}"
        exit 1
    }
    echo "ok     $url"
}

ask '"live"' "$service/health/live"
ask '"ready"' "$service/health/ready"
ask '"data"' "$service/v1/models"
ask swagger-ui "$service/docs"
ask '"openapi"' "$service/openapi.json"
ask '"predictions"' "$service/v1/image-classification" --data-binary @samples/photo_cat_cc0.jpg
ask '"mask"' "$service/v1/image-segmentation" --data-binary @samples/street_camvid_ccbync.jpg
ask PNG "$service/v1/image-segmentation" --data-binary @samples/street_camvid_ccbync.jpg --header 'Accept: image/png'
ask '"text"' "$service/v1/speech-recognition" --data-binary @samples/speech_an4_valid.flac
ask '"probabilities"' "$service/v1/brain-network-classification" --data-binary @samples/connectome_synthetic.csv
ask inference_requests_total "$service/metrics"

# Prometheus has seen those requests once it scraped again.
for _ in $(seq 30); do
    found=$(curl --silent --show-error --fail --get "$prometheus/api/v1/query" \
        --data-urlencode 'query=sum(inference_requests_total{outcome="ok"})')
    if [[ $found =~ \"value\":\[[0-9.]+,\"([1-9][0-9]*)\"\] ]]; then
        echo "ok     Prometheus has counted ${BASH_REMATCH[1]} requests"
        exit 0
    fi
    sleep 1
done
echo "FAILED Prometheus has counted no request: $found"
exit 1
