//! Services: virtual addresses and published ports are leased with the object.

use std::{collections::BTreeSet, net::IpAddr};

use mesh_types::{
    NetworkId, Protocol, Revision, ServiceId, TaskId,
    spec::{EndpointMode, PortSpec, ServiceMode, ServiceSpec},
    task::TaskState,
};

use super::{At, LEASED_PORTS, Store, names};
use crate::{
    command::{Outcome, Rejection},
    model::{Holder, Service, UpdateState, UpdateStatus},
};

impl Store {
    pub(super) fn create_service(
        &mut self,
        at: At,
        id: ServiceId,
        spec: &ServiceSpec,
    ) -> Result<Outcome, Rejection> {
        names::check(&spec.name)?;
        if self.services.contains_key(&id) {
            return Err(Rejection::Exists(format!("service with id {id} already exists")));
        }
        if self.services.values().any(|other| names::same(&other.spec.name, &spec.name)) {
            return Err(Rejection::Exists(format!(
                "name conflicts with an existing object: service {} already exists",
                spec.name
            )));
        }
        self.check_spec(spec)?;
        let ports = self.choose_ports(id, spec, &[])?;
        let vips = self.choose_vips(spec, &[])?;
        self.move_vips(id, &[], &vips);
        let service = Service {
            id,
            meta: at.made(),
            spec: spec.clone(),
            spec_version: at.revision,
            previous_spec: None,
            vips,
            ports,
            removing: false,
            update: None,
            update_failures: Vec::new(),
        };
        self.services.insert(id, service);
        Ok(Outcome::Warnings(Vec::new()))
    }

    pub(super) fn update_service(
        &mut self,
        at: At,
        id: ServiceId,
        version: Revision,
        spec: &ServiceSpec,
    ) -> Result<Outcome, Rejection> {
        let old = self.services.get(&id).ok_or_else(|| not_found(id))?;
        if old.meta.version != version {
            return Err(Rejection::OutOfSequence);
        }
        if old.spec.name != spec.name {
            return Err(Rejection::Precondition("renaming services is not supported".into()));
        }
        if std::mem::discriminant(&old.spec.mode) != std::mem::discriminant(&spec.mode) {
            return Err(Rejection::Precondition("service mode change is not allowed".into()));
        }
        self.replace_spec(at, id, spec)?;
        Ok(Outcome::Warnings(Vec::new()))
    }

    /// Puts another spec in a service's place. Whatever tasks that outdates are replaced by its
    /// update policy; an update that waits for the user goes on in any case.
    fn replace_spec(&mut self, at: At, id: ServiceId, spec: &ServiceSpec) -> Result<(), Rejection> {
        let old = self.services.get(&id).ok_or_else(|| not_found(id))?;
        self.check_spec(spec)?;
        let ports = self.choose_ports(id, spec, &old.ports)?;
        let vips = self.choose_vips(spec, &old.vips)?;
        // What a task is made from: besides its spec, which interfaces it has.
        let outdated = old.spec.task != spec.task
            || old.spec.networks != spec.networks
            || old.ports.is_empty() != ports.is_empty();
        let held = old.vips.clone();
        self.move_vips(id, &held, &vips);
        if let Some(service) = self.services.get_mut(&id) {
            let previous = std::mem::replace(&mut service.spec, spec.clone());
            service.previous_spec = Some(Box::new(previous));
            service.vips = vips;
            service.ports = ports;
            if outdated {
                service.spec_version = at.revision;
            }
            let next = match service.update.as_ref().map(|update| update.state) {
                Some(UpdateState::Paused) => Some(UpdateState::Updating),
                Some(UpdateState::RollbackPaused) if !outdated => {
                    Some(UpdateState::RollbackStarted)
                }
                _ => outdated.then_some(UpdateState::Updating),
            };
            match (next, service.update.as_ref().and_then(|update| update.completed_ms)) {
                (Some(state), _) => service.begin(at, state, "update in progress".into()),
                // Clients that wait for this change must not take the end of another for its end.
                (None, Some(_)) => service.update = None,
                (None, None) => {}
            }
            at.touch(&mut service.meta);
        }
        Ok(())
    }

    /// How the leader's loops say that an update goes on, see
    /// [`crate::command::TaskChange::Update`].
    pub(super) fn advance_update(
        &mut self,
        at: At,
        id: ServiceId,
        spec_version: Revision,
        state: UpdateState,
        message: &str,
    ) {
        let Some(service) = self.services.get_mut(&id) else { return };
        if service.spec_version != spec_version || service.rolls().is_none() {
            return;
        }
        if state != UpdateState::RollbackStarted {
            service.conclude(at, state, message.to_owned());
            return;
        }
        let done = self.roll_back(at, id, message);
        let Some(service) = self.services.get_mut(&id) else { return };
        match done {
            // The spec that failed is none to go back to.
            Ok(()) => service.previous_spec = None,
            Err(refusal) => {
                let message = format!("update paused, could not be rolled back: {refusal}");
                service.conclude(at, UpdateState::Paused, message);
            }
        }
    }

    /// A rollback that the user asks for. As in Swarm the two specs change places: asked for again,
    /// it takes the first one back.
    pub(super) fn roll_back_service(
        &mut self,
        at: At,
        id: ServiceId,
        version: Revision,
    ) -> Result<Outcome, Rejection> {
        let service = self.services.get(&id).ok_or_else(|| not_found(id))?;
        if service.meta.version != version {
            return Err(Rejection::OutOfSequence);
        }
        self.roll_back(at, id, "manually requested rollback")?;
        Ok(Outcome::Warnings(Vec::new()))
    }

    /// Brings the spec before back, by its rollback policy.
    fn roll_back(&mut self, at: At, id: ServiceId, message: &str) -> Result<(), Rejection> {
        let service = self.services.get(&id).ok_or_else(|| not_found(id))?;
        let previous = service.previous_spec.clone().ok_or_else(|| {
            Rejection::Precondition(format!(
                "service {} does not have a previous spec",
                service.spec.name
            ))
        })?;
        self.replace_spec(at, id, &previous)?;
        if let Some(service) = self.services.get_mut(&id) {
            service.begin(at, UpdateState::RollbackStarted, message.to_owned());
        }
        Ok(())
    }

    /// As in Swarm the service is gone at once, and so are its VIPs and ports; its tasks stay, to
    /// be removed, until their nodes say that they ended.
    pub(super) fn remove_service(&mut self, at: At, id: ServiceId) -> Result<Outcome, Rejection> {
        let service = self.services.remove(&id).ok_or_else(|| not_found(id))?;
        self.move_vips(id, &service.vips, &[]);
        let tasks: Vec<TaskId> =
            self.tasks.values().filter(|task| task.service == id).map(|task| task.id).collect();
        for task in tasks {
            self.desire(at, task, TaskState::Remove);
            // Nobody finds it by name any more; it need not drain.
            self.release(at, task);
            self.forget(task);
        }
        Ok(Outcome::Done)
    }

    fn check_spec(&self, spec: &ServiceSpec) -> Result<(), Rejection> {
        let mut seen = BTreeSet::new();
        for attachment in &spec.networks {
            let id = attachment.network;
            let network = self
                .networks
                .get(&id)
                .ok_or_else(|| Rejection::NotFound(format!("network {id} not found")))?;
            if network.spec.ingress {
                return Err(Rejection::Invalid(format!(
                    "Service cannot be explicitly attached to the ingress network \"{}\"",
                    network.spec.name
                )));
            }
            if !seen.insert(id) {
                return Err(Rejection::Invalid(format!(
                    "network {} is given twice",
                    network.spec.name
                )));
            }
        }
        // Interfaces are `eth0`…; the index is one byte.
        if spec.networks.len() > 128 {
            return Err(Rejection::Invalid("a service joins at most 128 networks".into()));
        }
        if let ServiceMode::Replicated { replicas } = spec.mode
            && replicas > MAX_REPLICAS
        {
            return Err(Rejection::Invalid(format!(
                "{replicas} replicas are too many: at most {MAX_REPLICAS}"
            )));
        }
        if spec.endpoint_mode == EndpointMode::Dnsrr && !spec.ports.is_empty() {
            return Err(Rejection::Invalid(
                "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"
                    .into(),
            ));
        }
        if spec.ports.iter().any(|port| port.target == 0) {
            return Err(Rejection::Invalid("EndpointSpec: target port must not be 0".into()));
        }
        if !spec.ports.is_empty() && self.ingress().is_none() {
            return Err(Rejection::Precondition(
                "service needs ingress network, but no ingress network is present".into(),
            ));
        }
        Ok(())
    }

    /// The published ports with the open ones filled in: those that were leased before stay.
    fn choose_ports(
        &self,
        id: ServiceId,
        spec: &ServiceSpec,
        old: &[PortSpec],
    ) -> Result<Vec<PortSpec>, Rejection> {
        let others = self.services.values().filter(|service| service.id != id);
        let mut taken: BTreeSet<(Protocol, u16)> = others
            .flat_map(|service| &service.ports)
            .map(|port| (port.protocol, port.published))
            .collect();
        let mut ports = spec.ports.clone();
        let mut own = BTreeSet::new();
        for port in ports.iter().filter(|port| port.published != 0) {
            let key = (port.protocol, port.published);
            if let Some(what) = reserved(self, key) {
                return Err(Rejection::Invalid(format!(
                    "port '{}/{}' is used by mesh itself for {what} and cannot be published",
                    port.published, port.protocol
                )));
            }
            if taken.contains(&key) {
                return Err(self.port_conflict(id, key));
            }
            if !own.insert(key) {
                return Err(Rejection::Invalid(format!(
                    "EndpointSpec: duplicate published ports provided: {}/{}",
                    port.published, port.protocol
                )));
            }
        }
        taken.extend(own);
        for port in ports.iter_mut().filter(|port| port.published == 0) {
            let kept = old.iter().find(|before| {
                (before.protocol, before.target) == (port.protocol, port.target)
                    && LEASED_PORTS.contains(&before.published)
                    && !taken.contains(&(before.protocol, before.published))
            });
            let free = || LEASED_PORTS.into_iter().find(|p| !taken.contains(&(port.protocol, *p)));
            port.published =
                kept.map(|before| before.published).or_else(free).ok_or_else(|| {
                    Rejection::Exhausted(format!(
                        "no free {} port is left in {}-{}: publish one outside of it",
                        port.protocol,
                        LEASED_PORTS.start(),
                        LEASED_PORTS.end()
                    ))
                })?;
            taken.insert((port.protocol, port.published));
        }
        Ok(ports)
    }

    fn port_conflict(&self, id: ServiceId, (protocol, published): (Protocol, u16)) -> Rejection {
        let owner = self.services.values().filter(|service| service.id != id).find(|service| {
            service.ports.iter().any(|p| (p.protocol, p.published) == (protocol, published))
        });
        let owner = owner.map_or_else(String::new, |service| {
            format!("'{}' ({})", service.spec.name, service.id)
        });
        Rejection::Invalid(format!(
            "port '{published}' is already in use by service {owner} as an ingress port"
        ))
    }

    /// The virtual addresses: one per network, those held before stay.
    fn choose_vips(
        &self,
        spec: &ServiceSpec,
        old: &[(NetworkId, IpAddr)],
    ) -> Result<Vec<(NetworkId, IpAddr)>, Rejection> {
        if spec.endpoint_mode == EndpointMode::Dnsrr {
            return Ok(Vec::new());
        }
        spec.networks
            .iter()
            .map(|attachment| {
                if let Some(held) = old.iter().find(|(id, _)| *id == attachment.network) {
                    return Ok(*held);
                }
                let network = self.networks.get(&attachment.network).ok_or_else(|| {
                    Rejection::NotFound(format!("network {} not found", attachment.network))
                })?;
                let vip = network.free_address().ok_or_else(|| {
                    Rejection::Exhausted(format!(
                        "could not find an available IP while allocating VIP: {}",
                        network.full()
                    ))
                })?;
                Ok((network.id, vip))
            })
            .collect()
    }

    /// Gives back the VIPs that are no longer held and takes the new ones.
    fn move_vips(
        &mut self,
        id: ServiceId,
        old: &[(NetworkId, IpAddr)],
        new: &[(NetworkId, IpAddr)],
    ) {
        for (network, vip) in old.iter().filter(|held| !new.contains(held)) {
            if let Some(network) = self.networks.get_mut(network) {
                network.leases.remove(vip);
            }
        }
        for (network, vip) in new.iter().filter(|held| !old.contains(held)) {
            if let Some(network) = self.networks.get_mut(network) {
                network.lease(*vip, Holder::Vip(id));
            }
        }
    }
}

impl Service {
    fn begin(&mut self, at: At, state: UpdateState, message: String) {
        let started_ms = at.now_ms;
        self.update = Some(UpdateStatus { state, started_ms, completed_ms: None, message });
        self.update_failures.clear();
    }

    fn conclude(&mut self, at: At, state: UpdateState, message: String) {
        let Some(update) = &mut self.update else { return };
        update.state = state;
        update.message = message;
        if matches!(state, UpdateState::Completed | UpdateState::RollbackCompleted) {
            update.completed_ms = Some(at.now_ms);
        }
        at.touch(&mut self.meta);
    }
}

/// Slots are made one task each; more would swamp the store before any network had room.
const MAX_REPLICAS: u64 = 10_000;

/// Ports that the mesh would take from the nodes' own daemons: it answers before the host does.
fn reserved(store: &Store, key: (Protocol, u16)) -> Option<&'static str> {
    let data = store.cluster.as_ref().map_or(4789, |cluster| cluster.spec.data_path_port);
    match key {
        (Protocol::Tcp, 2377) => Some("its managers"),
        (Protocol::Tcp | Protocol::Udp, 7946) => Some("membership"),
        (Protocol::Udp, 4500) => Some("encrypted networks"),
        (Protocol::Udp, port) if port == data => Some("its tunnels"),
        _ => None,
    }
}

fn not_found(id: ServiceId) -> Rejection {
    Rejection::NotFound(format!("service {id} not found"))
}
