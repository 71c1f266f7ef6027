//! A command in a task: on the task's node between the executor and the wire, on the manager
//! between the wire and the API.

use bytes::Bytes;
use mesh_executor::{ExecSession, ExecSpec};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

use crate::{
    agent::AgentHandle,
    api::backend,
    rpc::{
        frames::{FrameReader, FrameWriter},
        messages::{ExecInput, ExecOutput, ExecRequest},
    },
};

const CHUNK: usize = 32 << 10;

/// On the task's node.
pub(crate) async fn serve(
    agent: &AgentHandle,
    request: ExecRequest,
    input: FrameReader<ExecInput>,
    output: FrameWriter<ExecOutput>,
) {
    let spec = ExecSpec { argv: request.argv, env: request.env, dir: request.dir.map(Into::into) };
    let last = match agent.exec(request.task, spec).await {
        Ok(session) => {
            let _ = output.send(&ExecOutput::Started).await;
            run(session, input, &output).await
        }
        Err(error) => ExecOutput::Failed(error.to_string()),
    };
    let _ = output.send(&last).await;
}

/// Carries bytes until the command has ended and all its output is sent. When the caller goes away
/// the session is dropped, which kills the command.
async fn run(
    session: ExecSession,
    mut input: FrameReader<ExecInput>,
    output: &FrameWriter<ExecOutput>,
) -> ExecOutput {
    let ExecSession { stdin, mut stdout, mut stderr, mut control } = session;
    let mut stdin = Some(stdin);
    let (mut out, mut err) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut out_open, mut err_open, mut in_open) = (true, true, true);
    let mut ended = None;
    loop {
        if let Some(end) = ended.take_if(|_| !out_open && !err_open) {
            return end;
        }
        let sent = tokio::select! {
            () = output.closed() => return ExecOutput::Failed("the caller went away".to_owned()),
            read = stdout.read(&mut out), if out_open => match read {
                Ok(n) if n > 0 => {
                    output.send(&ExecOutput::Stdout(Bytes::copy_from_slice(&out[..n]))).await
                }
                _ => { out_open = false; Ok(()) }
            },
            read = stderr.read(&mut err), if err_open => match read {
                Ok(n) if n > 0 => {
                    output.send(&ExecOutput::Stderr(Bytes::copy_from_slice(&err[..n]))).await
                }
                _ => { err_open = false; Ok(()) }
            },
            message = input.next(), if in_open => {
                match message {
                    Ok(Some(ExecInput::Stdin(bytes))) => {
                        let gone = match &mut stdin {
                            Some(pipe) => pipe.write_all(&bytes).await.is_err(),
                            None => false,
                        };
                        if gone { stdin = None; }
                    }
                    Ok(Some(ExecInput::Signal(signal))) => {
                        let _ = control.signal(signal).await;
                    }
                    Ok(Some(ExecInput::Resize(..))) => {}
                    Ok(Some(ExecInput::StdinEnd)) => stdin = None,
                    Ok(None) | Err(_) => { stdin = None; in_open = false; }
                }
                Ok(())
            }
            end = control.wait(), if ended.is_none() => {
                ended = Some(match end {
                    Ok(code) => ExecOutput::Exit(code),
                    Err(error) => ExecOutput::Failed(error.to_string()),
                });
                Ok(())
            }
        };
        if sent.is_err() {
            return ExecOutput::Failed("the caller went away".to_owned());
        }
    }
}

/// On the manager: joins the wire to the API's channels.
pub(crate) fn bridge(
    writer: FrameWriter<ExecInput>,
    mut reader: FrameReader<ExecOutput>,
) -> backend::ExecSession {
    let (input, mut inputs) = mpsc::channel(8);
    let (outputs, output) = mpsc::channel(8);
    let reading = tokio::spawn(async move {
        loop {
            let message = match reader.next().await {
                Ok(Some(ExecOutput::Started)) => continue,
                Ok(Some(ExecOutput::Stdout(bytes))) => backend::ExecOutput::Stdout(bytes),
                Ok(Some(ExecOutput::Stderr(bytes))) => backend::ExecOutput::Stderr(bytes),
                Ok(Some(ExecOutput::Exit(code))) => backend::ExecOutput::Exit(code),
                Ok(Some(ExecOutput::Failed(why))) => backend::ExecOutput::Failed(why),
                Ok(None) => backend::ExecOutput::Failed("the node ended the stream".to_owned()),
                Err(error) => backend::ExecOutput::Failed(error.to_string()),
            };
            let last =
                matches!(message, backend::ExecOutput::Exit(_) | backend::ExecOutput::Failed(_));
            // Dropping the reader tells the node that the caller is gone.
            if outputs.send(message).await.is_err() || last {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(message) = inputs.recv().await {
            let message = match message {
                backend::ExecInput::Stdin(bytes) => ExecInput::Stdin(bytes),
                backend::ExecInput::Eof => ExecInput::StdinEnd,
                backend::ExecInput::Signal(signal) => ExecInput::Signal(signal),
            };
            if writer.send(&message).await.is_err() {
                return;
            }
        }
        // The API dropped its end: the command is abandoned, which kills it.
        reading.abort();
    });
    backend::ExecSession { input, output }
}
