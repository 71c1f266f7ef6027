//! `GET /system/df`: what this node's disk is used for. The output of tasks takes the place of
//! containers, what the daemon keeps that of volumes.

use std::{fs, io, path::Path, time::UNIX_EPOCH};

use axum::{Json, extract::State};
use mesh_types::TaskId;
use serde_json::{Value, json};

use super::{ApiError, Shared, convert::network::container_id, read};

/// What a node keeps of a task.
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    task: TaskId,
    bytes: u64,
    created: u64,
    running: bool,
}

/// `GET /system/df`.
pub(super) async fn disk(State(backend): State<Shared>) -> Result<Json<Value>, ApiError> {
    let state_dir = backend.local().engine.state_dir;
    let looked = tokio::task::spawn_blocking({
        let state_dir = state_dir.clone();
        move || {
            let state_dir = Path::new(&state_dir);
            let raft = bytes(&state_dir.join("raft"))?;
            let (all, tasks) = (bytes(state_dir)?, tasks(&state_dir.join("tasks"))?);
            let of_tasks: u64 = tasks.iter().map(|task| task.bytes).sum();
            Ok::<_, io::Error>((raft, all.saturating_sub(raft + of_tasks), tasks))
        }
    });
    let cannot = |error: io::Error| {
        ApiError::internal(format!("cannot look at what {state_dir} takes: {error}"))
    };
    let (raft, rest, tasks) =
        looked.await.map_err(io::Error::other).and_then(|looked| looked).map_err(cannot)?;
    // A worker does not know what they are.
    let about = |kept: &Kept| {
        let known = read(&backend, |store| {
            let task = store.tasks.get(&kept.task)?;
            Some((container_id(task), task.name(), task.spec.image.clone()))
        });
        known
            .ok()
            .flatten()
            .unwrap_or_else(|| (kept.task.to_string(), kept.task.to_string(), "process".to_owned()))
    };
    let container = |kept: &Kept| {
        let (id, name, image) = about(kept);
        let state = if kept.running { "running" } else { "exited" };
        json!({
            "Id": id, "Names": [format!("/{name}")], "Image": image, "ImageID": "", "Command": "",
            "Created": kept.created, "State": state, "Status": state, "Ports": [], "Labels": {},
            "SizeRw": kept.bytes, "SizeRootFs": kept.bytes, "Mounts": [],
            "HostConfig": {"NetworkMode": "default"}, "NetworkSettings": {"Networks": {}},
        })
    };
    let volume = |name: &str, path: String, bytes: u64| {
        json!({
            "Name": name, "Driver": "local", "Mountpoint": path, "Scope": "local", "Labels": {},
            "Options": {}, "UsageData": {"Size": bytes, "RefCount": 1},
        })
    };
    Ok(Json(json!({
        "LayersSize": 0, "BuilderSize": 0, "Images": [], "BuildCache": [],
        "Containers": tasks.iter().map(container).collect::<Vec<_>>(),
        "Volumes": [
            volume("raft", format!("{state_dir}/raft"), raft),
            volume("state", state_dir.clone(), rest),
        ],
    })))
}

/// The tasks of which there is something in a directory.
fn tasks(dir: &Path) -> io::Result<Vec<Kept>> {
    let mut kept = Vec::new();
    for entry in entries(dir)? {
        let Some(task) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let path = entry.path();
        let made = fs::metadata(path.join("spec.json")).and_then(|spec| spec.modified());
        let created = made.ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        kept.push(Kept {
            task,
            bytes: bytes(&path)?,
            created: created.map_or(0, |since| since.as_secs()),
            running: path.join("pid").exists() && !path.join("exit.json").exists(),
        });
    }
    Ok(kept)
}

/// The bytes of all files below a directory. What goes meanwhile is not counted.
pub(crate) fn bytes(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in entries(dir)? {
        let Ok(about) = entry.metadata() else { continue };
        sum += if about.is_dir() { bytes(&entry.path())? } else { about.len() };
    }
    Ok(sum)
}

fn entries(dir: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tasks_and_files_take_is_counted() {
        let dir = std::env::temp_dir().join(format!("meshd-usage-{}", std::process::id()));
        let (runs, ended) = (TaskId::from_bits(1), TaskId::from_bits(2));
        for (task, files) in [(runs, &["pid"][..]), (ended, &["pid", "exit.json"])] {
            let path = dir.join(task.to_string());
            fs::create_dir_all(path.join("etc")).unwrap();
            fs::write(path.join("etc/hosts"), [0; 100]).unwrap();
            files.iter().for_each(|file| fs::write(path.join(file), [0; 10]).unwrap());
        }
        fs::create_dir_all(dir.join("others")).unwrap();
        let mut found = tasks(&dir).unwrap();
        found.sort_by_key(|kept| kept.task);
        let told: Vec<_> = found.iter().map(|k| (k.task, k.bytes, k.running)).collect();
        assert_eq!(told, [(runs, 110, true), (ended, 120, false)]);
        assert_eq!(bytes(&dir).unwrap(), 230);
        assert_eq!(bytes(&dir.join("nowhere")).unwrap(), 0);
        fs::remove_dir_all(&dir).unwrap();
    }
}
