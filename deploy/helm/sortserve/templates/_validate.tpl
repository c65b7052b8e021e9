{{/* What the schema cannot say: values that do not go together. Each message says what to do. */}}
{{- define "sortserve.validate" -}}
{{- $name := include "sortserve.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{- fail (printf "%s cannot be the name of a Service, which begins with a letter and has small letters, digits and dashes: give another as fullnameOverride" $name) }}
{{- end }}
{{- if and (eq .Values.model.source "pvc") (not .Values.model.pvc.claimName) }}
{{- fail "model.source is pvc: model.pvc.claimName must name the claim that holds the checkpoint" }}
{{- end }}
{{- if and (eq .Values.model.source "pull") (not .Values.model.pull.repo) (not .Values.model.pull.command) }}
{{- fail "model.source is pull: model.pull.repo must name a Hugging Face id, or model.pull.command must download" }}
{{- end }}
{{- if and (ne .Values.model.source "baked") .Values.model.name }}
{{- fail (printf "model.name is for model.source baked only: with %s the checkpoint's folder is known" .Values.model.source) }}
{{- end }}
{{- if and .Values.auth.keys.existingSecret .Values.auth.keys.inline }}
{{- fail "auth.keys.existingSecret and auth.keys.inline exclude each other: give one of them" }}
{{- end }}
{{- if lt (include "sortserve.grace" . | int) (include "sortserve.leastGrace" . | int) }}
{{- fail (printf "terminationGracePeriodSeconds is %s, and must be at least preStopSeconds + shutdown-timeout + 10 = %s, or requests are cut off" (include "sortserve.grace" .) (include "sortserve.leastGrace" .)) }}
{{- end }}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail (printf "autoscaling.minReplicas (%v) must not be above autoscaling.maxReplicas (%v)" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) }}
{{- end }}
{{- if and .Values.autoscaling.enabled (not .Values.autoscaling.targetPressure) (not .Values.autoscaling.targetWaiting) (not .Values.autoscaling.extraMetrics) }}
{{- fail "autoscaling needs a metric: give targetPressure, targetWaiting or extraMetrics" }}
{{- end }}
{{- if and .Values.podDisruptionBudget.enabled (kindIs "invalid" .Values.podDisruptionBudget.minAvailable) (kindIs "invalid" .Values.podDisruptionBudget.maxUnavailable) }}
{{- fail "podDisruptionBudget needs minAvailable or maxUnavailable" }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress.enabled: ingress.hosts must have an entry" }}
{{- end }}
{{- if eq .Values.mode "ray" }}
{{- if .Values.autoscaling.enabled }}
{{- fail "autoscaling is for mode deployment: in mode ray, Ray scales; see ray.deployments and ray.enableInTreeAutoscaling" }}
{{- end }}
{{- if .Values.tls.existingSecret }}
{{- fail "tls.existingSecret is for mode deployment: Ray Serve speaks plain HTTP; let the ingress end TLS" }}
{{- end }}
{{- if .Values.extraArgs }}
{{- fail "extraArgs is for mode deployment: in mode ray settings come from config and extraEnv" }}
{{- end }}
{{- $worker := .Values.ray.worker }}
{{- if or (gt (int $worker.minReplicas) (int $worker.replicas)) (gt (int $worker.replicas) (int $worker.maxReplicas)) }}
{{- fail (printf "ray.worker: minReplicas (%v) <= replicas (%v) <= maxReplicas (%v) must hold" $worker.minReplicas $worker.replicas $worker.maxReplicas) }}
{{- end }}
{{- end }}
{{- end }}
