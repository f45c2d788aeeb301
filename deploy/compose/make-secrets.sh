#!/bin/sh
# Make the secrets that docker-compose.yml mounts, once: a file that exists is never touched.
#
#   deploy/compose/make-secrets.sh [FOLDER]        default: secrets, beside docker-compose.yml
#
# The folder is its owner's alone. The files in it are readable to all, because Compose mounts them
# one by one with the mode they have here, and the users inside the containers are others.
set -eu
umask 077
folder=${1:-$(dirname "$0")/../../secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

# keep NAME VALUE; printf is the shell's own, so that no value shows in a list of processes
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

# Valkey's users: ours may do all but administer; `probe`, the health check, may only ping.
password=$(cat "$folder/redis_password")
keep darkroom_redis_url "redis://:$password@redis:6379/0"
keep redis_users.acl "user default on >$password ~* &* +@all -@dangerous -@admin
user probe on nopass resetchannels -@all +ping
"
