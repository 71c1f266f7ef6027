//! `meshctl task`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use mesh_api::{ExecRequest, Frame, FrameKind};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::client::{Client, escape};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command inside a task's namespaces, wherever in the cluster it is
    Exec(ExecArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Set a variable on top of the task's own (may be repeated)
    #[arg(short, long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Working directory
    #[arg(short, long, default_value = "", hide_default_value = true, value_name = "DIR")]
    workdir: String,
    /// The task: its id, its name, or `SERVICE.SLOT`
    task: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Bytes of standard input per frame.
const CHUNK: usize = 64 << 10;

pub(crate) async fn run(client: &Client, command: Command) -> Result<ExitCode> {
    let Command::Exec(args) = command;
    let request = ExecRequest { cmd: args.command, env: args.env, working_dir: args.workdir };
    let path = format!("/mesh/task/{}/exec", escape(&args.task));
    let stream = client.upgrade(&path, &request).await?;
    let (reader, writer) = tokio::io::split(stream);
    let (send, frames) = mpsc::channel(8);
    tokio::spawn(write_frames(writer, frames));
    tokio::spawn(read_stdin(send.clone()));
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let mut signals = signal(kind).context("cannot watch for signals")?;
        let send = send.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let frame = Frame::number(FrameKind::Signal, kind.as_raw_value());
                if send.send(frame).await.is_err() {
                    break;
                }
            }
        });
    }
    // While a sender is left the connection stays open both ways, which keeps the process alive.
    let status = read_frames(reader).await.with_context(|| format!("task {}", args.task))?;
    drop(send);
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

async fn write_frames(mut writer: impl AsyncWrite + Unpin, mut frames: mpsc::Receiver<Frame>) {
    while let Some(frame) = frames.recv().await {
        if writer.write_all(&frame.encode()).await.is_err() {
            break;
        }
    }
}

async fn read_stdin(send: mpsc::Sender<Frame>) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; CHUNK];
    loop {
        // An input that cannot be read has ended.
        let length = stdin.read(&mut buffer).await.unwrap_or(0);
        let frame = Frame { kind: FrameKind::Stdin, payload: buffer[..length].to_vec() };
        if send.send(frame).await.is_err() || length == 0 {
            break;
        }
    }
}

/// Copies output until the process has ended; its exit status.
async fn read_frames(mut reader: impl AsyncRead + Unpin) -> Result<i32> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        let mut header = [0; Frame::HEADER_LEN];
        reader
            .read_exact(&mut header)
            .await
            .context("the connection broke before the command ended")?;
        let (kind, length) = Frame::decode_header(header)?;
        let mut payload = vec![0; length];
        reader
            .read_exact(&mut payload)
            .await
            .context("the connection broke before the command ended")?;
        match kind {
            FrameKind::Stdout => {
                stdout.write_all(&payload).await.context("cannot write the output")?;
                stdout.flush().await.context("cannot write the output")?;
            }
            FrameKind::Stderr => {
                stderr.write_all(&payload).await.context("cannot write the output")?;
                stderr.flush().await.context("cannot write the output")?;
            }
            FrameKind::Failed => bail!("{}", String::from_utf8_lossy(&payload)),
            FrameKind::Exit => {
                let frame = Frame { kind, payload };
                return frame.as_number().context("the daemon sent no exit status");
            }
            FrameKind::Stdin | FrameKind::Signal => bail!("the daemon sent a {kind:?} frame"),
        }
    }
}
