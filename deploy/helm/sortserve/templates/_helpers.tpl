{{/* Names */}}
{{- define "sortserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* At most 46 characters: Ray, keys and the like append up to 17. */}}
{{- define "sortserve.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 46 | trimSuffix "-" }}
{{- else if contains (include "sortserve.name" .) .Release.Name }}
{{- .Release.Name | trunc 46 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "sortserve.name" .) | trunc 46 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sortserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sortserve.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Labels */}}
{{- define "sortserve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sortserve.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "sortserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "sortserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of pods. Not the chart's version, or each new one would load every model anew. */}}
{{- define "sortserve.podLabels" -}}
{{ include "sortserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The pods that serve: of the Deployment, or Ray's workers. */}}
{{- define "sortserve.servingLabels" -}}
{{ include "sortserve.selectorLabels" . }}
app.kubernetes.io/component: {{ ternary "worker" "server" (eq .Values.mode "ray") }}
{{- end }}

{{/* What changes a pod when the files that it reads only at its start do. */}}
{{- define "sortserve.podAnnotations" -}}
checksum/config: {{ include (print $.Template.BasePath "/configmap.yaml") . | sha256sum }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The image */}}
{{- define "sortserve.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- $tag := printf "%s%s%s" .Chart.AppVersion (ternary "-cuda" "" .Values.gpu.enabled) (ternary "-ray" "" (eq .Values.mode "ray")) }}
{{- printf "%s:%s" .Values.image.repository (default $tag .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* Where the checkpoint is: empty for the server's own default. */}}
{{- define "sortserve.model" -}}
{{- if eq .Values.model.source "pvc" }}
{{- printf "/models/%s" .Values.model.pvc.path | trimSuffix "/" }}
{{- else if eq .Values.model.source "pull" }}
{{- "/models/checkpoint" }}
{{- else }}
{{- .Values.model.name }}
{{- end }}
{{- end }}

{{- define "sortserve.ranks" -}}
{{- $given := dig "tensor-parallel-size" 0 .Values.config | int }}
{{- if $given }}{{ $given }}{{ else if .Values.gpu.enabled }}{{ .Values.gpu.count }}{{ else }}1{{ end }}
{{- end }}

{{/* Seconds */}}
{{- define "sortserve.shutdownTimeout" -}}
{{- dig "shutdown-timeout" 30 .Values.config }}
{{- end }}

{{- define "sortserve.leastGrace" -}}
{{- add .Values.preStopSeconds (ceil (include "sortserve.shutdownTimeout" . | float64)) 10 }}
{{- end }}

{{- define "sortserve.grace" -}}
{{- $least := include "sortserve.leastGrace" . | int }}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds }}
{{- add $least 5 }}
{{- else }}
{{- .Values.terminationGracePeriodSeconds | int }}
{{- end }}
{{- end }}

{{/* Secrets and files */}}
{{- define "sortserve.hasNamedKeys" -}}
{{- if or .Values.auth.keys.existingSecret .Values.auth.keys.inline }}true{{ end }}
{{- end }}

{{- define "sortserve.keysSecret" -}}
{{- default (printf "%s-keys" (include "sortserve.fullname" .)) .Values.auth.keys.existingSecret }}
{{- end }}

{{- define "sortserve.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") }}
{{- end }}

{{/* What requests go to, from outside of the chart. */}}
{{- define "sortserve.servingService" -}}
{{- if eq .Values.mode "ray" }}
{{- printf "%s-serve-svc" (include "sortserve.fullname" .) }}
{{- else }}
{{- include "sortserve.fullname" . }}
{{- end }}
{{- end }}

{{- define "sortserve.servingPort" -}}
{{- ternary 8000 .Values.service.port (eq .Values.mode "ray") }}
{{- end }}
