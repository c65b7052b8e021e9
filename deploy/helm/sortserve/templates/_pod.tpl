{{/* Parts of pods that the Deployment and Ray's share. */}}

{{/* Settings that are the chart's, as variables: flags would not reach Ray's replicas. */}}
{{- define "sortserve.env" -}}
{{- with include "sortserve.model" . }}
- {name: SORTSERVE_MODEL, value: {{ . | quote }}}
{{- end }}
- {name: SORTSERVE_CONFIG, value: /etc/sortserve/config/config.yaml}
- {name: SORTSERVE_HOST, value: {{ .Values.listenHost | quote }}}
- {name: SORTSERVE_PORT, value: "8000"}
{{- if include "sortserve.hasNamedKeys" . }}
- {name: SORTSERVE_API_KEYS_FILE, value: /etc/sortserve/keys/keys.yaml}
{{- end }}
{{- with .Values.auth.apiKey }}
{{- if .existingSecret }}
- name: SORTSERVE_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .secretKey | quote }}}
{{- end }}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: SORTSERVE_SSL_CERTFILE, value: /etc/sortserve/tls/tls.crt}
- {name: SORTSERVE_SSL_KEYFILE, value: /etc/sortserve/tls/tls.key}
{{- end }}
{{- if gt (include "sortserve.ranks" . | int) 1 }}
- {name: SORTSERVE_TENSOR_PARALLEL_SIZE, value: {{ include "sortserve.ranks" . | quote }}}
{{- end }}
# An emptyDir may be written to by others; a folder that the server makes inside it may not.
- {name: SORTSERVE_CACHE_DIR, value: /data/sortserve}
- {name: SORTSERVE_CACHE_SIZE, value: {{ .Values.cache.maxSize | quote }}}
- {name: XDG_CACHE_HOME, value: /data/cache}
- {name: TRITON_CACHE_DIR, value: /data/cache/triton}
- {name: CUDA_CACHE_PATH, value: /data/cache/cuda}
- {name: HF_HOME, value: /data/huggingface}
- {name: HOME, value: /tmp}
{{- if ne .Values.model.source "baked" }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sortserve.volumeMounts" -}}
- {name: config, mountPath: /etc/sortserve/config, readOnly: true}
- {name: cache, mountPath: /data}
- {name: tmp, mountPath: /tmp}
{{- if ne .Values.model.source "baked" }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if include "sortserve.hasNamedKeys" . }}
# A folder, not a subPath: a changed Secret reaches a mounted folder only.
- {name: keys, mountPath: /etc/sortserve/keys, readOnly: true}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/sortserve/tls, readOnly: true}
{{- end }}
{{- if and (gt (include "sortserve.ranks" . | int) 1) (eq .Values.mode "deployment") }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sortserve.volumes" -}}
- name: config
  configMap: {name: {{ include "sortserve.fullname" . | quote }}}
- name: cache
  {{- if .Values.cache.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.cache.existingClaim | quote }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.cache.sizeLimit | quote }}}
  {{- end }}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.tmp.sizeLimit | quote }}}
{{- if eq .Values.model.source "pvc" }}
- name: models
  persistentVolumeClaim: {claimName: {{ .Values.model.pvc.claimName | quote }}, readOnly: true}
{{- else if eq .Values.model.source "pull" }}
- name: models
  emptyDir: {sizeLimit: {{ .Values.model.pull.sizeLimit | quote }}}
{{- end }}
{{- if include "sortserve.hasNamedKeys" . }}
- name: keys
  secret:
    secretName: {{ include "sortserve.keysSecret" . | quote }}
    defaultMode: 0440
    items: [{key: {{ .Values.auth.keys.secretKey | quote }}, path: keys.yaml}]
{{- end }}
{{- if .Values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ .Values.tls.existingSecret | quote }}, defaultMode: 0440}
{{- end }}
{{- if and (gt (include "sortserve.ranks" . | int) 1) (eq .Values.mode "deployment") }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.shm.sizeLimit | quote }}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Downloads the checkpoint; starts anew where it was stopped. */}}
{{- define "sortserve.initContainers" -}}
{{- if eq .Values.model.source "pull" }}
{{- with .Values.model.pull }}
- name: pull-model
  image: {{ default (include "sortserve.image" $) .image | quote }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  {{- if .command }}
  command: {{ toJson .command }}
  {{- else }}
  command: [hf, download, {{ .repo | quote }}, --local-dir, /models/checkpoint{{ with .revision }}, --revision, {{ . | quote }}{{ end }}]
  {{- end }}
  env:
    - {name: MODEL_DIR, value: /models/checkpoint}
    - {name: HF_HOME, value: /tmp/huggingface}
    - {name: HOME, value: /tmp}
    {{- if .tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ .tokenSecret.name | quote }}, key: {{ .tokenSecret.key | quote }}}
    {{- end }}
    {{- with .env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources: {{ toJson (default $.Values.resources .resources) }}
  securityContext: {{ toJson $.Values.securityContext }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
{{- with .Values.extraInitContainers }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Resources of what computes: with its GPUs. */}}
{{- define "sortserve.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpu.enabled }}
{{- $gpus := dict .Values.gpu.resourceName (.Values.gpu.count | toString) }}
{{- $_ := set $resources "limits" (merge $gpus (default dict $resources.limits)) }}
{{- $_ := set $resources "requests" (merge $gpus (default dict $resources.requests)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* Of every pod. */}}
{{- define "sortserve.podSpec" -}}
serviceAccountName: {{ include "sortserve.serviceAccountName" . | quote }}
# Variables of Services are of no use here.
enableServiceLinks: false
securityContext: {{ toJson .Values.podSecurityContext }}
terminationGracePeriodSeconds: {{ include "sortserve.grace" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .Values.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "sortserve.topologySpread" -}}
{{- $own := dict "labelSelector" (dict "matchLabels" (include "sortserve.servingLabels" . | fromYaml)) }}
{{- range .Values.topologySpreadConstraints }}
- {{ toJson (merge (deepCopy .) $own) }}
{{- end }}
{{- end }}
