#!/bin/sh
# Ask a running server by curl: relation, caption and image, first by the plain routes of `mi2rage-rt serve`, then by the
# Open Inference Protocol, which Triton speaks too.
#
#   sh curl.sh photo.jpg                                       # mi2rage-rt serve on localhost:8080
#   URL=http://localhost:8000 PROTOCOL=v2 sh curl.sh photo.jpg # Triton
#   TOKEN=... sh curl.sh photo.jpg                             # where the server asks for a bearer token
set -eu

photo=${1:?"usage: sh curl.sh PHOTO"}
url=${URL:-http://localhost:8080}

ask() { # PATH and curl's own arguments; a refusal prints what the server says and fails
  path=$1
  shift
  curl --silent --show-error --fail-with-body ${TOKEN:+--header "Authorization: Bearer $TOKEN"} "$@" "$url$path"
  echo
}

if [ "${PROTOCOL:-plain}" = plain ]; then
  # The photo as a file beside the JSON; mentions are character offsets into `text`.
  ask /v1/relations --form 'request={"text": "Tim Cook leads Apple", "head": [0, 8], "tail": [15, 20]}' --form "image=@$photo"
  ask /v1/captions --form 'request={"prefix": "a"}' --form "image=@$photo"
  ask /v1/images --json '{"prompt": "a red car by the sea", "seed": 7}'
else
  # JSON of the protocol holds texts alone; image files go as binary tensors, see client.py.
  ask /v2/health/ready
  ask /v2/models/classifier/infer --json '{"inputs": [
    {"name": "tokens", "datatype": "BYTES", "shape": [1, 1], "data": ["[\"Tim\", \"Cook\", \"leads\", \"Apple\"]"]},
    {"name": "head", "datatype": "INT32", "shape": [1, 2], "data": [0, 2]},
    {"name": "tail", "datatype": "INT32", "shape": [1, 2], "data": [3, 4]}]}'
  # One binary tensor: its length (4 bytes, least first), then the file; the header says how long the JSON before it is.
  size=$(wc -c <"$photo" | tr -d ' ')
  head='{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": '$((size + 4))'}}]}'
  length=$(printf '\\%03o\\%03o\\%03o\\%03o' $((size & 255)) $((size >> 8 & 255)) $((size >> 16 & 255)) $((size >> 24)))
  # shellcheck disable=SC2059  # the length is a format: octal escapes
  { printf '%s' "$head"; printf "$length"; cat "$photo"; } |
    ask /v2/models/captioner/infer --header "Inference-Header-Content-Length: ${#head}" \
      --header 'Content-Type: application/octet-stream' --data-binary @-
fi
