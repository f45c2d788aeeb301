#!/bin/sh
# Make the secrets that docker-compose.yml mounts, once: existing files are kept.
#
#   deploy/compose/make-secrets.sh [FOLDER]        default: secrets, beside docker-compose.yml
#
# Only its owner can enter the folder. Every user can read the files in it, because Compose mounts
# them one by one with their mode, and the users inside the containers have other ids.
set -eu
umask 077
folder=${1:-$(dirname "$0")/../../secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

# keep NAME VALUE; printf is a shell builtin, so that no value shows in a list of processes
keep() {
    if [ -e "$folder/$1" ]; then
        return
    fi
    printf '%s' "$2" > "$folder/$1.new"
    chmod 444 "$folder/$1.new"
    mv "$folder/$1.new" "$folder/$1"
    echo "made $1"
}

keep .gitignore '*'
keep postgres_password "$(random)"
keep redis_password "$(random)"
keep ray_token "$(random)"
keep darkroom_webhook_encryption_keys "$(random)"
keep darkroom_s3_access_key_id darkroom
keep darkroom_s3_secret_access_key "$(random)"

password=$(cat "$folder/postgres_password")
keep darkroom_database_url "postgresql://darkroom:$password@postgres:5432/darkroom"

# Valkey's users: Darkroom's may do everything except administer; the health check, `probe`, may
# only ping.
password=$(cat "$folder/redis_password")
keep darkroom_redis_url "redis://:$password@redis:6379/0"
keep redis_users.acl "user default on >$password ~* &* +@all -@dangerous -@admin
user probe on nopass resetchannels -@all +ping
"
